"""The server that forks the processes of tests: what takes seconds to import, it has imported once."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tinyexperts.training.loop", "torch._dynamo"])
