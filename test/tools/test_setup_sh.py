"""scripts/setup.sh: what is installed once; and the --help of all scripts."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHELL = ["setup.sh", "test.sh", "serve.sh"]
HELPFUL = [f.name for f in SCRIPTS.glob("*.py") if f.read_text().startswith("#!")]
# A tree with an environment and made-up tools, which write a line for each call.
FILES = {
    "upstream.toml": 'version = "1.0"\n',
    "requirements/lock.txt": "a==1\n",
    "python/a.py": "",
    "scripts/overlay/a.py": "",
    "scripts/patchset": "",
    ".venv/bin/python": '#!/bin/sh\n[ "$2" != overlay.cli ] || '
    "{ echo wheel >>calls; touch dist/sglang-1.0+1.whl; }\n",
    "bin/uv": "#!/bin/sh\nshift 4\necho $* >>calls\nsleep 0.5\n",
    "dist/x": "",
}


@pytest.fixture
def start(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(SCRIPTS / "setup.sh", tmp_path / "scripts")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environment.pop("MXFP8_RELEASE", None)
    options = dict(cwd=tmp_path, env=environment, start_new_session=True)
    return lambda: subprocess.Popen(["./scripts/setup.sh"], **options)


def test_what_is_installed_is_not_installed_again(start, tmp_path):
    both = [start(), start()]  # at once
    assert [process.wait() for process in both] == [0, 0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and calls.count("wheel") == 1, calls
    assert start().wait() == 0
    assert (tmp_path / "calls").read_text().splitlines() == calls
    (tmp_path / "python" / "a.py").write_text("changed")
    assert start().wait() == 0
    assert (tmp_path / "calls").read_text().splitlines() == 2 * calls


def test_what_did_not_end_is_installed_in_full(start, tmp_path):
    first, calls = start(), tmp_path / "calls"
    while not calls.exists() or "lock.txt" not in calls.read_text():
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -9
    assert [start().wait(), start().wait()] == [0, 0]
    assert calls.read_text().count("--no-deps --reinstall -r ") == 1


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
