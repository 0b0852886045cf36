"""scripts/serve.sh: what it starts, says and stops, with a made-up server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LINE = "MXFP8 linear layers: 90 on flashinfer_cutlass (qkv_proj [960, 576])"

# In the place of .venv's Python. `--mode` says what the server does.
PYTHON = f"""#!{sys.executable}
import http.server, json, os, sys, time

options = dict(zip(sys.argv, sys.argv[1:]))
mode = options.get("--mode", "serve")
print("[time] model", options["--model-path"], os.getpid(), flush=True)
print("[time] threads", os.environ["OMP_NUM_THREADS"], flush=True)
if mode == "hang":
    time.sleep(60)
if mode == "slow":
    time.sleep(8)
if mode == "fail":
    sys.exit("launch_server.py: error: no such flag")
if mode != "silent":
    print("[time TP0] {LINE}", flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        self.do_GET()
        [message] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        answer = dict(message=dict(content="asked " + message["content"]))
        self.wfile.write(json.dumps(dict(choices=[answer])).encode())

address = options["--host"], int(options["--port"])
http.server.HTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture
def port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.fixture
def scripts(tmp_path) -> Path:
    """The scripts of a tree that needs no set-up and starts the made-up server."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("serve.sh", "serve.py"):
        shutil.copy(SCRIPTS / name, folder)
    (folder / "setup.sh").write_text(f"""source {SCRIPTS}/setup.sh
ROOT={tmp_path} VENV={tmp_path}/.venv DEFAULT_MODEL={tmp_path}/model
setup() {{ :; }}
get_default_model() {{ :; }}
cuda_device_visible() {{ false; }}
""")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return folder


@pytest.fixture
def ask(scripts, port):
    """Runs serve.sh with a question, which the made-up server repeats."""

    def ask(*more: str) -> subprocess.CompletedProcess:
        command = [scripts / "serve.sh", "--ask", "Why?", "--port", port, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return ask


@pytest.fixture
def log(scripts, port) -> Path:
    return scripts.parent / ".cache" / "logs" / f"server-{port}.log"


def test_what_reaches_the_terminal(ask):
    result = ask("--", "--mode", "slow")
    assert result.returncode == 0
    assert result.stdout == "asked Why?\n"
    device, start, *steps, layers, ready = result.stderr.splitlines()
    assert device.startswith("No CUDA device is visible: ")
    assert start.startswith("Starting the server (log: ")
    assert [step.partition(" s: ")[2] for step in steps] == ["threads 1"]
    assert layers == LINE
    assert ready.startswith("The server is ready after ")


def test_a_server_that_cannot_start_is_reported(ask):
    result = ask("--mode", "fail")
    assert result.returncode == 1 and result.stdout == ""
    assert "error: no such flag" in result.stderr
    assert "the server stopped while it started" in result.stderr


def test_the_servers_own_arguments(ask, log):
    more = ["--model-path", "org-1/Model_8B", "--host=0.0.0.0", "--mode", "silent"]
    result = ask("--", *more)
    assert result.stdout == "asked Why?\n"
    assert "model org-1/Model_8B " in log.read_text()
    assert f"{log} says nothing of MXFP8 linear layers" in result.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_stops_the_server_and_lets_go_of_the_port(
    name, ask, scripts, port, log
):
    command = [scripts / "serve.sh", "--port", port, "--", "--mode", "hang"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any(line.startswith("  ") for line in process.stderr)  # its first step
        before = log.read_text()
        second = ask()
        assert log.read_text() == before
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == 128 + getattr(signal, name)
    finally:
        process.kill()
    assert second.returncode == 1
    assert f"port {port} is in use; choose another" in second.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(before.split()[3]), 0)
    with socket.create_server(("127.0.0.1", int(port))):
        assert "is in use" in ask().stderr
    assert ask().returncode == 0
