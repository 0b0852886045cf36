"""scripts/serve.sh as a user runs it: a real model, a real server, a real answer.

MXFP8_RELEASE, which test.sh sets and serve.sh reads, is the release of sglang.
"""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
QUESTION = "What is the capital of Japan?"
IS_0_5_9 = os.environ.get("MXFP8_RELEASE", "0.5.9") == "0.5.9"


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def serve(port: int, *arguments: str) -> subprocess.Popen:
    command = [ROOT / "scripts" / "serve.sh", "--port", str(port), *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **pipes)


def is_free(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def test_served_model_knows_the_capital_of_japan(port):
    process = serve(port, "--ask", QUESTION)
    answer, told = process.communicate(timeout=800)
    assert process.returncode == 0, told
    assert "Tokyo" in answer and is_free(port)
    if not IS_0_5_9:
        assert "MXFP8 linears run on FlashInfer's kernels as emulated" in told
        return
    [layers] = re.findall("(?m)^MXFP8 linear layers: .*$", told)
    assert re.search(r"\d+ on flashinfer_cutlass .*; \d+ on flashinfer_trtllm", layers)
    readme = (ROOT / "README.md").read_text().splitlines()
    assert layers in readme and answer.strip() in readme


def test_a_server_that_cannot_start_is_reported(port):
    process = serve(port, "--ask", QUESTION, "--", "--no-such-flag")
    answer, told = process.communicate(timeout=300)
    assert process.returncode == 1 and answer == ""
    assert "unrecognized arguments: --no-such-flag" in told
    assert f"did not start\nThe end of {ROOT}/.cache/logs/server-" in told


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_stops_the_server_and_lets_go_of_the_port(name, port):
    in_use = f"port {port} is in use; choose another"
    process = serve(port)
    try:
        assert any(line.startswith("  ") for line in process.stderr)  # its first step
        servers = psutil.Process(process.pid).children(recursive=True)
        assert servers and in_use in serve(port).communicate(timeout=60)[1]
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == 128 + getattr(signal, name)
    finally:
        process.kill()
    assert not psutil.wait_procs(servers, timeout=10)[1]
    with socket.create_server(("127.0.0.1", port)):
        assert in_use in serve(port).communicate(timeout=60)[1]
