"""The command `tinyexperts` as a process: its streams and exit codes; bad input is one sentence."""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

from tinyexperts.errors import EarlyExit, InputError
from tinyexperts.extras import MissingExtra, require_extra


def main() -> None:
    """Run a verb; bad input is one sentence and exit code 2, an interruption 130, a reader that has gone 141."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal can't show must not end a verb.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            require_extra("train", "the command tinyexperts")
            from tinyexperts.cli.parser import run_verb

            run_verb(sys.argv[1:])
        finally:
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()  # an error is reported here, at exit it would be a traceback
    except (InputError, MissingExtra, OSError) as error:  # OSError: an unwritable folder, a full disk
        if isinstance(error, BrokenPipeError) and _reader_has_gone(sys.stdout):
            _leave(141)  # as a process that SIGPIPE ends: `tinyexperts ... | head` has seen enough
        _exit(error, 2)
    except EarlyExit as error:
        _exit(error, error.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _reader_has_gone(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except (OSError, ValueError):  # no file of the operating system's
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _exit(why: object, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    with suppress(OSError):
        print(f"tinyexperts{'' if rank == '0' else f' (rank {rank})'}: {why}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> None:
    """Exit, without the text that a stream refuses: Python would try again, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
