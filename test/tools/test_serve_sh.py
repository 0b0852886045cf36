"""scripts/serve.sh and ask.py: wrong arguments, and what they say of a made-up server."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LINE = "MXFP8 linear layers: 90 on flashinfer_cutlass (qkv_proj [960, 576])"

# In the place of .venv's Python. `--mode` says what the server does.
PYTHON = f"""#!{sys.executable}
import http.server, os, sys, time

if sys.argv[1] != "-m":
    sys.exit(print("asked", sys.argv[2:]))
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

host = options.get("--host", "127.0.0.1")
http.server.HTTPServer((host, int(options["--port"])), Handler).serve_forever()
"""


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def ask(scripts: Path, port: str, *more: str) -> subprocess.CompletedProcess:
    """serve.sh with a question, which .venv's made-up Python repeats."""
    return run(scripts / "serve.sh", "--ask", "Why?", "--port", port, *more)


@pytest.fixture
def port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.fixture
def scripts(tmp_path) -> Path:
    """The scripts of a tree that needs no set-up and starts the made-up server."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("serve.sh", "ask.py", "in_venv.py"):
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


def log(scripts: Path, port: str) -> str:
    return (scripts.parent / ".cache" / "logs" / f"server-{port}.log").read_text()


@contextlib.contextmanager
def starting(scripts: Path, port: str) -> Iterator[subprocess.Popen]:
    """A serve.sh whose server never listens."""
    process = subprocess.Popen(
        [scripts / "serve.sh", "--port", port, "--", "--mode", "hang"],
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs start with SIGINT ignored, and bash cannot undo that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # Its first step.
        assert any(line.startswith("  ") for line in process.stderr)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--fp8-gemm-backend triton", "--fp8-gemm-backend; arguments for sglang"),
        ("--ask", "--ask needs a value"),
        ("--port http", "--port: http is no port"),
        ("--port 30000 -- --port x", "x is no port"),
        ("--model nothing", "nothing has no config.json"),
        ("-- --model-path=/nonexistent", "/nonexistent has no config.json"),
        ("--model FOLDER -- --quantization-param-path x", "convert_to_mxfp8.py"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    arguments = arguments.replace("FOLDER", str(tmp_path)).split()
    result = run(SCRIPTS / "serve.sh", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("serve.sh: ") and words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_whose_other_file_says_mxfp8_is_served(scripts, port, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text('{"quant_algo": "MXFP8"}')
    assert ask(scripts, port, "--model", str(tmp_path)).returncode == 0
    assert f"model {tmp_path} " in log(scripts, port)


@pytest.mark.parametrize("form", ["--port {}", "-- --port={}"])
def test_busy_port(form):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        result = run(SCRIPTS / "serve.sh", *form.format(port).split())
    assert result.returncode == 1
    assert f"port {port} is in use" in result.stderr


def test_what_reaches_the_terminal(scripts, port):
    result = ask(scripts, port, "--", "--mode", "slow")
    assert result.returncode == 0
    assert result.stdout == f"asked {['--url', f'http://127.0.0.1:{port}', 'Why?']}\n"
    device, start, *steps, layers, ready = result.stderr.splitlines()
    assert device.startswith("No CUDA device is visible: serving ")
    assert start.startswith("Starting the server (log: ")
    # Two looks at the log, which does not go on between them.
    assert [step.partition(" s: ")[2] for step in steps] == ["threads 1"]
    assert layers == LINE
    assert ready.startswith("The server is ready after ")


def test_a_server_that_cannot_start_is_reported(scripts, port):
    result = ask(scripts, port, "--", "--mode", "fail")
    assert result.returncode == 1 and result.stdout == ""
    assert "error: no such flag" in result.stderr
    assert "the server stopped while it started" in result.stderr


def test_a_name_on_the_hub_goes_to_the_server(scripts, port):
    name = "org-1/Model_8B.v2"
    result = ask(scripts, port, "--model", name, "--", "--mode", "silent")
    assert result.returncode == 0
    assert f"{name} is no folder here" in result.stderr
    assert f"model {name} " in log(scripts, port)
    assert f"server-{port}.log says nothing of MXFP8 linear layers" in result.stderr


def test_a_server_on_every_interface_is_asked_on_this_machine(scripts, port):
    result = ask(scripts, port, "--", "--host", "0.0.0.0")
    assert f"http://127.0.0.1:{port}" in result.stdout


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_stops_the_server_and_lets_go_of_the_port(name, scripts, port):
    with starting(scripts, port) as process:
        before = log(scripts, port)
        second = ask(scripts, port)
        assert log(scripts, port) == before
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == 128 + getattr(signal, name)
    assert second.returncode == 1
    assert f"port {port} is in use by another serve.sh" in second.stderr
    server = int(before.split()[3])
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert ask(scripts, port).returncode == 0


def test_another_program_that_takes_the_port_is_not_asked(scripts, port):
    foreign = 'import sys; sys.argv[1:1] = ["-m", "x", "--model-path", "x"]\n'
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", foreign + PYTHON, "--port", port]
    with starting(scripts, port) as process:
        other = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            other.kill()
            other.wait()
    assert process.returncode == 1
    assert f"another program took port {port}" in errors
    assert "is ready" not in errors


def test_ask_py_without_a_server(port):
    result = run(SCRIPTS / "ask.py", "--url", f"http://127.0.0.1:{port}", "Why?")
    assert result.returncode == 1
    assert result.stderr == f"ask.py: http://127.0.0.1:{port}: Connection error.\n"
