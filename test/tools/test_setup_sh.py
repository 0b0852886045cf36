"""scripts/setup.sh and env.sh: what is installed once; and the --help of all scripts."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHELL = ["setup.sh", "test.sh", "serve.sh"]
HELPFUL = [f.name for f in SCRIPTS.glob("*.py") if f.read_text().startswith("#!")]
# Each call of install_once writes a line.
SCRIPT = f"""set -euo pipefail
source {SCRIPTS}/env.sh
ROOT=$1 VENV=$1/.venv
cd "$1"
ensure_uv() {{ :; }}
ensure_venv() {{ :; }}
work() {{
    echo "begin $1 $reinstall" >>calls
    sleep 1
    # As setup.sh starts patchset, which makes sure of its tools.
    bash -c 'source {SCRIPTS}/env.sh; ROOT=$0; locked true' "$ROOT"
}}
install_once name "$2" work "$2"
"""


@pytest.fixture
def start(tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)

    def start(want: str) -> subprocess.Popen:
        command = ["bash", "-c", SCRIPT, "-", tmp_path, want]
        return subprocess.Popen(command, start_new_session=True)

    return start


def calls(folder: Path) -> list[str]:
    return [line.strip() for line in (folder / "calls").read_text().splitlines()]


def test_what_is_installed_is_not_installed_again(start, tmp_path):
    both = [start("1"), start("1")]  # at once
    assert [process.wait() for process in both] == [0, 0]
    assert [start(want).wait() for want in ("1", "2", "2", "1")] == [0] * 4
    assert calls(tmp_path) == ["begin 1", "begin 2", "begin 1"]
    # Unless its Python is gone.
    (tmp_path / ".venv" / "bin" / "python").unlink()
    assert start("1").wait() == 0
    assert len(calls(tmp_path)) == 4


def test_what_did_not_end_is_installed_in_full(start, tmp_path):
    first = start("1")
    while not (tmp_path / "calls").exists():
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -9
    assert [start("1").wait(), start("1").wait()] == [0, 0]
    assert calls(tmp_path) == ["begin 1", "begin 1 --reinstall"]


@pytest.mark.parametrize("name", [*SHELL, *sorted(HELPFUL)])
def test_help_says_what_is_needed(name):
    """Also by a Python without packages."""
    told = subprocess.check_output([SCRIPTS / name, "--help"], text=True)
    assert "setup.sh" in told or "GPU" in told


@pytest.mark.parametrize("name", SHELL)
def test_a_release_that_is_not_here_is_refused(name):
    command = [SCRIPTS / name, "--release", "0.5.8"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr == "No release 0.5.8 here: 0.5.9 0.5.23\n"
