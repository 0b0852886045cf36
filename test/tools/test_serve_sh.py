"""scripts/serve.sh with a made-up server that never answers; test/e2e has a real one."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# In the place of .venv's Python. `--fail` says what it does.
PYTHON = """#!/bin/bash
echo "[time] $$ threads $OMP_NUM_THREADS: $*"
[[ " $* " != *" --fail "* ]] || { echo "error: no such flag" && exit 2; }
sleep 60
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def serve(tmp_path, port):
    """Starts serve.sh of a tree that needs no set-up."""
    scripts, python = tmp_path / "scripts", tmp_path / ".venv" / "bin" / "python"
    scripts.mkdir()
    python.parent.mkdir(parents=True)
    for name in ("serve.sh", "serve.py"):
        shutil.copy(SCRIPTS / name, scripts)
    (scripts / "setup.sh").write_text(f"""source {SCRIPTS}/setup.sh
ROOT={tmp_path} VENV={tmp_path}/.venv DEFAULT_MODEL={tmp_path}/model
setup() {{ :; }}
get_default_model() {{ :; }}
cuda_device_visible() {{ false; }}
""")
    python.write_text(PYTHON)
    python.chmod(0o755)
    pipe = subprocess.PIPE

    def serve(*arguments: str) -> subprocess.Popen:
        command = [scripts / "serve.sh", "--port", str(port), *arguments]
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    return serve


@pytest.fixture
def log(tmp_path, port) -> Path:
    return tmp_path / ".cache" / "logs" / f"server-{port}.log"


def test_a_server_that_cannot_start_is_reported(serve, log):
    process = serve(
        "--ask", "Why?", "--", "--host=::1", "--model-path", "a/b", "--fail"
    )
    answer, told = process.communicate(timeout=60)
    assert process.returncode == 1 and answer == ""
    assert told.startswith("No CUDA device is visible: ")
    assert f"Starting the server (log: {log})" in told
    assert "error: no such flag" in told
    assert "the server stopped while it started" in told
    flags = log.read_text().partition(" threads 1: -m sglang.launch_server ")[2]
    assert flags.startswith("--model-path a/b --host ::1 --port ")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_stops_the_server_and_lets_go_of_the_port(name, serve, port, log):
    process = serve()
    try:
        assert any(line.startswith("  ") for line in process.stderr)  # its first step
        before = log.read_text()
        in_use = f"port {port} is in use; choose another"
        assert in_use in serve().communicate(timeout=60)[1]
        assert log.read_text() == before
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == 128 + getattr(signal, name)
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(before.split()[1]), 0)
    with socket.create_server(("127.0.0.1", port)):
        assert in_use in serve().communicate(timeout=60)[1]
    assert in_use not in serve("--fail").communicate(timeout=60)[1]
