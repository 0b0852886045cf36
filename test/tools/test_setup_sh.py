"""scripts/setup.sh and env.sh: what is installed once; and the --help of all scripts."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
HELPFUL = sorted(
    file.name for file in SCRIPTS.glob("*.py") if file.read_text().startswith("#!")
)
# Each call of install_once writes a line; a file `fail` or `slow` changes what it does.
SCRIPT = f"""set -euo pipefail
source {SCRIPTS}/env.sh
ROOT=$1 VENV=$1/.venv
cd "$1"
ensure_uv() {{ :; }}
ensure_venv() {{ :; }}
work() {{
    echo "begin $1 $reinstall" >>calls
    [[ ! -e slow ]] || sleep 1
    # As setup.sh starts patchset, which makes sure of its tools.
    bash -c 'source {SCRIPTS}/env.sh; ROOT=$0; locked true' "$ROOT"
    [[ ! -e fail ]] || return 3
    echo "end" >>calls
}}
install_once name "$2" work "$2"
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    return tmp_path


def start(tree: Path, want: str) -> subprocess.Popen:
    command = ["bash", "-c", SCRIPT, "-", tree, want]
    return subprocess.Popen(command, start_new_session=True)


def calls(tree: Path) -> list[str]:
    return [line.strip() for line in (tree / "calls").read_text().splitlines()]


def test_what_is_installed_is_not_installed_again(tree):
    for want in ("1", "1", "2", "2", "1"):
        assert start(tree, want).wait() == 0
    assert calls(tree)[::2] == ["begin 1", "begin 2", "begin 1"]
    # Unless its Python is gone.
    (tree / ".venv" / "bin" / "python").unlink()
    assert start(tree, "1").wait() == 0
    assert len(calls(tree)) == 8


@pytest.mark.parametrize("killed", [True, False])
def test_what_did_not_end_is_installed_in_full(tree, killed):
    change = tree / ("slow" if killed else "fail")
    change.touch()
    first = start(tree, "1")
    while not (tree / "calls").exists():
        time.sleep(0.05)
    if killed:
        os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == (-9 if killed else 3)
    change.unlink()
    assert start(tree, "1").wait() == 0
    assert "begin 1 --reinstall" in calls(tree)
    assert start(tree, "1").wait() == 0
    assert calls(tree).count("begin 1 --reinstall") == 1


def test_two_at_once_install_once(tree):
    (tree / "slow").touch()
    both = [start(tree, "1") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert calls(tree) == ["begin 1", "end"]


@pytest.mark.parametrize("name", ["setup.sh", "test.sh", "serve.sh", *HELPFUL])
def test_help_says_what_is_needed(name):
    """Also by a Python without packages."""
    command = [SCRIPTS / name, "--help"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0
    assert "setup.sh" in told.stdout or "GPU" in told.stdout


@pytest.mark.parametrize("name", ["setup.sh", "test.sh", "serve.sh"])
def test_a_release_that_is_not_here_is_refused(name):
    command = [SCRIPTS / name, "--release", "0.5.8"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr == "No release 0.5.8 here: 0.5.9 0.5.23\n"
