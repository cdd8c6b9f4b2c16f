"""`tinyexperts serve` on loopback, asked by the client of OpenAI."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from openai import OpenAI

from tinyexperts.training import generate_text


@contextmanager
def served(folder, *options):
    """Start the server; give a client when it answers."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tinyexperts", "serve", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--continuous-batching",)])
def test_completions_chats_and_streams_are_the_run_s_own(facts_run, exported_once, options):
    prompt, asked = "The floor of k3", {"max_tokens": 6, "temperature": 0}
    expected = generate_text(facts_run, prompt, temperature=0, max_new_tokens=6)
    with served(exported_once, *options) as client:
        model = client.models.list().data[0].id
        assert model == str(exported_once)
        completed = client.completions.create(model=model, prompt=prompt, **asked)
        assert completed.choices[0].text == expected
        parts = client.completions.create(model=model, prompt=prompt, stream=True, **asked)
        assert "".join(part.choices[0].text for part in parts if part.choices) == expected
        chat = [{"role": "user", "content": prompt}]
        answered = client.chat.completions.create(model=model, messages=chat, **asked)
        assert answered.choices[0].message.content == expected
