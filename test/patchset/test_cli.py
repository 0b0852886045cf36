"""The commands, on a small upstream: what they write and say, and what they refuse."""

import sys

import pytest
from overlay import check, lock, release
from overlay.cli import main
from small_upstream import (
    CHECKOUT,
    CORE,
    OVERLAY,
    TOML,
    UPSTREAM,
    WHEEL,
    commit,
    git,
    make_project,
    snapshot,
    with_sha256,
    write,
)
from wheel.wheelfile import WheelFile


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project")


@pytest.fixture
def checkout(tmp_path):
    """A checkout of "upstream", with a test and a pyproject."""
    root = tmp_path / "checkout"
    package = {f"python/{k}": v for k, v in UPSTREAM.items() if "dist-info" not in k}
    write(root, package | CHECKOUT)
    commit(root)
    return root


@pytest.fixture
def run(project, capsys):
    """Runs a command, which ends with `code`; what it says."""

    def run(*arguments, code=0, root=project) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments], root) == code
        run.stdout, stderr = capsys.readouterr()
        return stderr

    return run


def test_wheel(run, tmp_path):
    told = run("wheel", "--output", tmp_path / "out")
    assert "skipped  test/registered/test_core.py: it edits a file that wheels" in told
    wheel = tmp_path / "out/sglang-1.0+mxfp8.3-py3-none-any.whl"
    assert run.stdout == f"{wheel}\n"
    assert f"changed  {CORE}" in told and f"pip install {wheel}" in told
    with WheelFile(wheel) as archive:
        names = archive.namelist()
        assert all(archive.read(name) is not None for name in names)  # by its RECORD
        assert "sglang/trick.py" in names and "sglang-1.0.dist-info/RECORD" not in names
        assert not any("test_trick" in name for name in names)
        version = archive.read("sglang/_version.py").decode()
        metadata = archive.read("sglang-1.0+mxfp8.3.dist-info/METADATA").decode()
    assert "'1.0+mxfp8.3'" in version and "(1, 0, 'mxfp8.3')" in version
    assert "Version: 1.0+mxfp8.3\nRequires-Dist: flashinfer_python==2.0\n" in metadata
    first = wheel.read_bytes()
    run("wheel", "--output", tmp_path / "out")
    assert wheel.read_bytes() == first


def test_diff_and_apply_change_a_checkout_alike(run, checkout, tmp_path):
    before, patch = snapshot(checkout), tmp_path / "out.patch"
    run("diff", "--tree", checkout, "--output", patch)
    assert snapshot(checkout) == before
    text = patch.read_text()
    assert "Subject: Teach the package a trick\n" in text
    assert "\n\nIt was asked for.\n" in text
    assert "- run, CHOICES: b is faster (org/repo#7)\n" in text
    assert "b/test/registered/test_trick.py" in text
    assert "until" not in text and "test_here" not in text
    git(checkout, "am", patch)
    patched = snapshot(checkout)
    assert b'"flashinfer_python==2.0"' in patched["python/pyproject.toml"]
    both = b"class TestA:\n    pass\n\n\nclass TestB:\n    pass\n"
    assert patched["test/registered/test_core.py"] == both
    assert "python/sglang/trick.py" in patched
    git(checkout, "apply", "--reverse", patch)
    assert snapshot(checkout) == before
    (checkout / CORE).chmod(0o755)
    assert f"files into {checkout}. Next, there: `git d" in run("apply", checkout)
    assert (checkout / CORE).stat().st_mode & 0o777 == 0o755
    for command in ("apply", "check"):
        assert "already applied; nothing to do" in run(command, checkout)
    assert snapshot(checkout) == patched


def test_errors_are_collected_and_nothing_is_written(run, project, checkout):
    write(project, {CORE: OVERLAY[CORE].replace("run", "runs")})
    write(checkout, {"python/pyproject.toml": '"flashinfer_python==1.0.1"'})
    write(checkout, {"python/sglang/trick.py": "V = 3\n"})
    (checkout / "python/sglang/other.py").unlink()
    git(checkout, "tag", "v1.1")
    before = snapshot(checkout)
    told = run("apply", checkout, code=1)
    for error in (
        "core.py: upstream v1.1: `runs` is not there to prepend",
        "pyproject.toml: upstream v1.1 pins flashinfer_python 0 times to 1.0 or 2.0",
        "other.py: upstream v1.1 has no such file to merge into",
        "trick.py: upstream v1.1 has this file, and ours has no ledger",
        "4 problems, nothing is written; if it was patched before, restore it first",
    ):
        assert error in told
    # As is a drop without anything to drop, while there is something else to do.
    write(project, OVERLAY)
    write(checkout, {"python/sglang/other.py": "def kept():\n    return 2\n"})
    assert "`helper` is not there to drop" in run("apply", checkout, code=1)
    assert before.items() <= snapshot(checkout).items()
    assert "is no checkout of sglang: no python/py" in run("apply", project, code=1)


# A stack for another release


STACK = {
    "releases/1.0/upstream.toml": TOML.replace("= 3", "= 4").replace('"2.0"', '"1.0"'),
    "releases/1.0/1-more/pr.toml": 'subject = "Add one"\nbody = "Why."\n',
    f"releases/1.0/1-more/{CORE}": OVERLAY[CORE],
    "releases/1.0/2-trick/pr.toml": 'subject = "Use the trick"\nbody = "So."\n'
    'new = ["python/sglang/trick.py"]\n',
    f"releases/1.0/2-trick/{CORE}": '"""\nrun\n    why: it is a trick\n"""\n\n'
    "from overlay.marks import splice\n\nfrom sglang.trick import VALUE\n\n\n"
    "@splice\ndef run(x):\n    x = x + VALUE\n",
}
STACKED = """from sglang.trick import VALUE

CHOICES = ["a", "b"]


def run(x):
    x = x + VALUE
    return x
"""


@pytest.fixture
def stacked(run, project):
    write(project, {path: with_sha256(project, text) for path, text in STACK.items()})
    (project / lock.NAME).unlink()
    run("lock", "--release", "1.0")
    assert f'["1.0"."{CORE}"]' in (project / lock.NAME).read_text()


def test_a_stack_is_one_commit_a_folder(stacked, run, checkout, tmp_path):
    git(checkout, "tag", "v1.0")
    patch, options = tmp_path / "out.patch", ["--tree", checkout]
    run("diff", *options, "--output", patch)
    run("diff", *options, "--pr", "2-trick")
    assert patch.read_text().endswith(run.stdout)
    assert run.stdout.count("\nSubject: ") == 1
    git(checkout, "am", patch)
    subjects = git(checkout, "log", "--format=%s").decode().splitlines()
    assert subjects == ["Use the trick", "Add one", "base"]
    assert (checkout / CORE).read_text() == STACKED
    assert "other.py" not in patch.read_text()  # only what the stack edits
    for upto in (["--upto", "1"], []):
        run("wheel", "--release", "1.0", "--output", tmp_path, *upto)
        with WheelFile(tmp_path / "sglang-1.0+mxfp8.4-py3-none-any.whl") as file:
            assert ("sglang/trick.py" in file.namelist()) == (not upto)
    told = run("check", "--release", "1.0", "--upto", "3", code=1)
    assert "has 2 pull requests, not 3" in told
    told = run("lock", "--release", "1.0", "--upto", "1", code=1)
    assert "only all edits of a release are recorded" in told


# The wheel in the cache


def test_a_damaged_wheel_is_fetched_again(run, project, monkeypatch):
    cached, fetched = project / WHEEL, project / "fetched.whl"
    good = cached.read_bytes()
    for data in b"", b"another":
        cached.write_bytes(data)
        monkeypatch.setattr(release, "download", lambda *_: None)
        assert "could not be fetched" in run("diff", code=1)
        monkeypatch.setattr(release, "download", lambda *_: fetched)
        fetched.write_bytes(data)
        assert "not upstream.toml's, as the package index" in run("check", code=1)
        fetched.write_bytes(good)
        run("check")
    assert (project / ".cache/fetched.whl").read_bytes() == good


# The lock


def test_drift_is_refused_by_name_with_its_diff(run, project, checkout):
    text = UPSTREAM["sglang/core.py"].replace("return x", "# More.\n    return x + 7")
    write(checkout, {CORE: text})
    before = snapshot(checkout)
    for command in ("check", "apply"):
        told = run(command, checkout, code=1)
        assert f"{CORE}: `run` is not the one of 1.0 that the edit was written" in told
        assert "-    return x\n+    # More.\n+    return x + 7\n" in told
        assert "`CHOICES`" not in told
    assert snapshot(checkout) == before
    # Upstream itself added what the overlay adds, or the definition was never recorded.
    write(checkout, {CORE: UPSTREAM["sglang/core.py"] + "\n\ndef new():\n    pass\n"})
    overlay = OVERLAY[CORE].replace("run\n", "run, new\n")
    write(project, {CORE: overlay + "\n\ndef new():\n    return 1\n"})
    told = run("apply", checkout, code=1)
    assert f"{CORE}: `new` is new here: {lock.NAME} has it not for 1.0" in told


@pytest.mark.parametrize(
    "old, new", [('"CHOICES"', '"CHOICE"'), (' = "', ' = "0'), ('["1.0"', '["0.9"')]
)
def test_a_lock_that_is_out_of_date(old, new, run, project):
    file = project / lock.NAME
    text = file.read_text()
    file.write_text(text.replace(old, new))
    for command in ["check"] if "0.9" not in new else ["check", "wheel", "diff"]:
        told = run(command, code=1)
        assert "` is new here: " in told or "`run` is not the one of" in told
    run("lock")
    assert set(text.splitlines()) <= set(file.read_text().splitlines())


# The check


def test_check_writes_nothing_and_imports_what_it_can(run, checkout, monkeypatch):
    git(checkout, "tag", "v1.0")
    before = snapshot(checkout)
    told = run("check", checkout)
    assert "not imported: no .venv has the packages of upstream v1.0" in told
    monkeypatch.setattr(check, "interpreter", lambda root, version: sys.executable)
    for tree in ([], [checkout]):
        assert "imported: 3 of 3 modules" in run("check", *tree)
    assert snapshot(checkout) == before


@pytest.mark.parametrize(
    "code, error",
    [
        ("import os\n", "trick.py: ruff, isort or black would"),
        ("X = [1,2]\n", "trick.py: ruff, isort or black would"),
        ("X = lambda: y\n", "trick.py: `y` is undefined"),
        ("X = int('x')\n", "sglang.trick: ValueError: invalid literal"),
        ("from sglang.core import no\n\nX = no\n", "sglang.trick: ImportError: cannot"),
        ("import os\n\nos._exit(3)\n", "the import: ends its process"),
        ("def f(:\n", "trick.py: "),
        ("import nowhere\n\nX = nowhere\n", ""),
    ],
)
def test_check_finds(code, error, run, project, monkeypatch):
    monkeypatch.setattr(check, "interpreter", lambda root, version: sys.executable)
    write(project, {"python/sglang/trick.py": f'"""The trick."""\n\n{code}'})
    told = run("check", code=bool(error))
    assert error in told if error else "imported: 2 of 3 modules" in told
