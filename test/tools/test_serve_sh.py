"""scripts/serve.sh: the mistakes that it catches before it sets anything up."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

SERVE = Path(__file__).parents[2] / "scripts" / "serve.sh"


def serve(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SERVE, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_help():
    result = serve("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    for option in ("--ask", "--model", "--port", "-- ARGUMENT"):
        assert option in result.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--fp8-gemm-backend", "triton"], "--fp8-gemm-backend; arguments for sglang"),
        (["question"], "unknown argument question"),
        (["--ask"], "--ask needs a value"),
        (["--port", "http"], "--port: http is no port"),
        (["--port", "65536"], "65536 is no port"),
        (["--port", "30000", "--", "--port", "x"], "x is no port"),
        (["--", "--port"], "is no port"),
        (["--model", "/nonexistent"], "/nonexistent has no config.json"),
    ],
)
def test_wrong_arguments(arguments, words):
    result = serve(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("serve.sh: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_model_that_is_not_mxfp8(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    result = serve("--model", str(tmp_path))
    assert result.returncode == 2
    assert "convert_to_mxfp8.py" in result.stderr


@pytest.mark.parametrize("form", ["--port={}", "-- --port {}", "-- --port={}"])
def test_busy_port(form):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        arguments = form.format(port).split()
        if form.startswith("--port"):
            arguments = ["--port", port]
        result = serve(*arguments)
    assert result.returncode == 1
    assert f"port {port} is in use" in result.stderr
