"""The commands, on a small upstream: what they write and say, and what they refuse."""

import hashlib
import shutil
import sys
import zipfile

import pytest
from overlay import check, lock, release
from overlay.cli import main
from small_upstream import (
    CHECKOUT,
    OVERLAY,
    TOML,
    UPSTREAM,
    commit,
    git,
    make_project,
    snapshot,
    write,
)
from wheel.wheelfile import WheelFile

CORE = "python/sglang/core.py"
WHEEL = ".cache/sglang-1.0-py3-none-any.whl"


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project", OVERLAY, UPSTREAM, TOML)


@pytest.fixture
def checkout(tmp_path):
    """A checkout of "upstream", with a test, a pyproject and a page of documentation."""
    root = tmp_path / "checkout"
    package = {f"python/{k}": v for k, v in UPSTREAM.items() if "dist-info" not in k}
    write(root, package | CHECKOUT)
    return root


def told(capsys) -> str:
    return capsys.readouterr().err


def refused(capsys, project, *arguments, code=1) -> str:
    """What a command says that changes nothing."""
    capsys.readouterr()
    assert main([str(a) for a in arguments], project) == code
    return told(capsys)


def test_wheel(project, tmp_path, capsys):
    arguments = ["wheel", "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(arguments, project) == 0
    output = capsys.readouterr()
    wheel = tmp_path / "out/sglang-1.0+mxfp8.3-py3-none-any.whl"
    assert output.out == f"{wheel}\n"
    assert f"changed  {CORE}" in output.err and f"pip install {wheel}" in output.err
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
    main(arguments, project)
    assert wheel.read_bytes() == first


def test_diff_against_the_release(project, tmp_path, capsys):
    patch, again = tmp_path / "out.patch", tmp_path / "again.patch"
    for output in (patch, again):
        assert main(["diff", "--output", str(output)], project) == 0
    assert again.read_bytes() == patch.read_bytes()
    said = told(capsys)
    assert "skipped  test/registered/test_core.py: it edits a file that wheels" in said
    assert f"git am {patch}" in said
    text = patch.read_text()
    assert "Subject: Teach the package a trick\n" in text
    assert "\n\nIt was asked for.\n" in text
    assert "- run, CHOICES: b is faster (org/repo#7)\n" in text
    assert "until" not in text
    assert "b/test/registered/test_trick.py" in text
    assert "test_here" not in text and "test_table" not in text


def test_diff_against_a_checkout(project, checkout, tmp_path):
    commit(checkout)
    before = snapshot(checkout)
    patch = tmp_path / "out.patch"
    assert main(["diff", "--tree", str(checkout), "--output", str(patch)], project) == 0
    assert snapshot(checkout) == before
    git(checkout, "am", str(patch))
    patched = snapshot(checkout)
    assert b'"flashinfer_python==2.0"' in patched["python/pyproject.toml"]
    assert b"| `--gemm` | `a`, `b`, `c` |" in patched["docs/options.md"]
    assert patched["test/registered/test_core.py"] == (
        b"class TestA:\n    pass\n\n\nclass TestB:\n    pass\n"
    )
    git(checkout, "apply", "--reverse", str(patch))
    assert snapshot(checkout) == before
    assert main(["apply", str(checkout)], project) == 0
    assert snapshot(checkout) == patched


@pytest.mark.parametrize("output", ["FOLDER/file/x", "/proc/x"])
@pytest.mark.parametrize("command", ["diff", "wheel"])
def test_an_output_that_cannot_be_written(command, output, project, tmp_path, capsys):
    (tmp_path / "file").touch()
    output = output.replace("FOLDER", str(tmp_path))
    said = refused(capsys, project, command, "--output", output)
    assert said.startswith("error: ") and said.count("\n") == 1  # before the work


def test_apply_twice_changes_nothing_more(project, checkout, capsys):
    (checkout / CORE).chmod(0o755)
    assert main(["apply", str(checkout)], project) == 0
    said = told(capsys)
    assert f"files into {checkout}. Next, there: `git diff`" in said
    assert (checkout / CORE).stat().st_mode & 0o777 == 0o755
    patched = snapshot(checkout)
    for command in ("apply", "check"):
        said = refused(capsys, project, command, checkout, code=0)
        assert "already applied; nothing to do" in said
    assert snapshot(checkout) == patched and "python/sglang/trick.py" in patched


def test_a_tree_that_was_patched_in_part_is_refused(project, checkout, capsys):
    other = UPSTREAM["sglang/other.py"].partition("def kept")
    write(checkout, {"python/sglang/other.py": "".join(other[1:])})
    before = snapshot(checkout)
    said = refused(capsys, project, "apply", checkout)
    assert "other.py: upstream checkout: `helper` is not there to drop" in said
    assert "if it was patched before, restore it first" in said
    assert snapshot(checkout) == before


def test_errors_are_collected_and_nothing_is_written(project, checkout, capsys):
    write(project, {CORE: OVERLAY[CORE].replace("run", "runs")})
    write(checkout, {"docs/options.md": "nothing", "python/pyproject.toml": ""})
    write(checkout, {"python/sglang/trick.py": "VALUE = 3\n"})
    (checkout / "python/sglang/other.py").unlink()
    commit(checkout)
    git(checkout, "tag", "v1.1")
    before = snapshot(checkout)
    said = refused(capsys, project, "apply", checkout)
    for error in (
        "core.py: upstream v1.1: `runs` is not there to prepend",
        "pyproject.toml: upstream v1.1 has no match for",
        "other.py: upstream v1.1 has no such file to merge into",
        "trick.py: upstream v1.1 has this file, and ours has no ledger",
        " skipped  docs/options.md: upstream v1.1 has no match",
        "4 problems, nothing is written",
    ):
        assert error in said
    assert snapshot(checkout) == before


@pytest.mark.parametrize("row", ["`a`, `b`, `c`", "`a`, `c`, `b`"])
def test_what_upstream_says_itself_stays(row, project, checkout, capsys):
    pins = {"python/pyproject.toml": '"flashinfer_python==3.0"\n'}
    page = {"docs/options.md": f"| `--gemm` | {row} |\n"}
    write(checkout, pins | page)
    assert "no match for" in refused(capsys, project, "apply", checkout)
    write(checkout, {"python/pyproject.toml": '"flashinfer_python==2.0"\n'})
    assert main(["apply", str(checkout)], project) == 0
    assert (checkout / "docs/options.md").read_text() == page["docs/options.md"]


@pytest.mark.parametrize("gone", ["python/sglang", "test", "python/pyproject.toml"])
def test_what_is_no_checkout(gone, project, checkout, capsys):
    target = checkout / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    said = refused(capsys, project, "apply", checkout)
    assert f"{checkout} is no checkout of sglang: no {gone}" in said


# A stack for another release


STACK = {
    "releases/1.0/upstream.toml": TOML.partition("[[edit]]")[0].replace("= 3", "= 4"),
    "releases/1.0/1-more/pr.toml": 'subject = "Add one"\nbody = "Why."\n',
    f"releases/1.0/1-more/{CORE}": OVERLAY[CORE],
    "releases/1.0/2-trick/pr.toml": 'subject = "Use the trick"\nbody = "So."\n'
    'new = ["python/sglang/trick.py"]\n',
    f"releases/1.0/2-trick/{CORE}": '"""\nrun\n    why: it is a trick\n"""\n\n'
    "from overlay.marks import splice\n\nfrom sglang.trick import VALUE\n\n\n"
    "@splice\ndef run(x):\n    x = x + VALUE\n",
}


@pytest.fixture
def stacked(project):
    sha256 = hashlib.sha256((project / WHEEL).read_bytes()).hexdigest()
    write(project, {path: t.replace("{sha256}", sha256) for path, t in STACK.items()})
    (project / lock.NAME).unlink()
    assert main(["lock", "--release", "1.0"], project) == 0
    return project


def test_a_stack_is_one_commit_a_folder(stacked, checkout, tmp_path, capsys):
    assert f'["1.0"."{CORE}"]' in (stacked / lock.NAME).read_text()
    commit(checkout)
    git(checkout, "tag", "v1.0")
    patch, options = tmp_path / "out.patch", ["--tree", str(checkout)]
    assert main(["diff", *options, "--output", str(patch)], stacked) == 0
    said = told(capsys)
    assert "1-more: 3 lines of upstream's files change, 0 are new" in said
    assert "2-trick: 4 lines of upstream's files change, 3 are new" in said
    assert main(["diff", *options, "--pr", "2-trick"], stacked) == 0
    assert patch.read_text().endswith(one := capsys.readouterr().out)
    assert one.count("\nSubject: ") == 1 and "Subject: Use the trick\n" in one
    git(checkout, "am", str(patch))
    assert git(checkout, "log", "--format=%s").split(b"\n")[:2] == [
        b"Use the trick",
        b"Add one",
    ]
    core = "from sglang.trick import VALUE\n\nCHOICES = {}\n\n\ndef run(x):\n{}".format
    assert (checkout / CORE).read_text() == core(
        '["a", "b"]', "    x = x + VALUE\n    return x\n"
    )
    assert (checkout / "python/sglang/other.py").read_text() == UPSTREAM[
        "sglang/other.py"
    ]
    main(["apply", str(checkout)], stacked)
    assert not git(checkout, "status", "--porcelain")


def test_a_part_of_a_stack(stacked, tmp_path, capsys):
    for upto in (["--upto", "1"], []):
        arguments = ["wheel", "--release", "1.0", "--output", str(tmp_path), *upto]
        assert main(arguments, stacked) == 0
        with zipfile.ZipFile(tmp_path / "sglang-1.0+mxfp8.4-py3-none-any.whl") as file:
            assert ("sglang/trick.py" in file.namelist()) == (not upto)
    said = refused(capsys, stacked, "check", "--release", "1.0", "--upto", "3")
    assert "has 2 pull requests, not 3" in said
    said = refused(capsys, stacked, "lock", "--release", "1.0", "--upto", "1")
    assert "only all edits of a release are recorded" in said


# The wheel in the cache


@pytest.mark.parametrize("what", ["truncated", "another", "empty"])
def test_a_damaged_wheel_is_fetched_again(what, project, tmp_path, monkeypatch, capsys):
    wheel, good = project / WHEEL, tmp_path / "good" / "sglang-1.0-py3-none-any.whl"
    good.parent.mkdir()
    shutil.copy(wheel, good)
    fetched = lambda version, folder: shutil.copy(good, folder) and folder / good.name
    monkeypatch.setattr(release, "download", lambda version, folder: None)
    data = {"truncated": good.read_bytes()[:300], "another": good.read_bytes() + b"x"}
    wheel.write_bytes(data.get(what, b""))
    assert "could not be fetched" in refused(capsys, project, "diff")
    assert wheel.exists()  # until there is a better one
    monkeypatch.setattr(release, "download", fetched)
    said = refused(capsys, project, "diff", code=0)
    assert "fetching it again" in said and wheel.read_bytes() == good.read_bytes()
    assert "fetching" not in refused(capsys, project, "diff", code=0)


def test_a_fetched_wheel_of_another_sha256_is_refused(project, monkeypatch, capsys):
    wheel = (project / WHEEL).rename(project / "other.whl")
    wheel.write_bytes(b"PK")
    fetched = lambda version, folder: shutil.copy(wheel, folder / WHEEL[7:])
    monkeypatch.setattr(release, "download", fetched)
    said = refused(capsys, project, "check")
    assert "not upstream.toml's, as the package index" in said
    assert not (project / WHEEL).exists()


# The lock


def test_drift_is_refused_by_name_with_its_diff(project, checkout, capsys):
    text = UPSTREAM["sglang/core.py"].replace("return x", "# More.\n    return x + 7")
    write(checkout, {CORE: text})
    before = snapshot(checkout)
    for command in ("check", "apply"):
        said = refused(capsys, project, command, checkout)
        assert f"{CORE}: `run` is not the one of 1.0 that the edit was written" in said
        assert "-    return x\n+    # More.\n+    return x + 7\n" in said
        assert "`CHOICES`" not in said
    assert snapshot(checkout) == before
    # Upstream itself added what the overlay adds, or the definition was never recorded.
    write(checkout, {CORE: UPSTREAM["sglang/core.py"] + "\n\ndef new():\n    pass\n"})
    overlay = (
        OVERLAY[CORE].replace("run\n", "run, new\n") + "\n\ndef new():\n    return 1\n"
    )
    write(project, {CORE: overlay})
    said = refused(capsys, project, "apply", checkout)
    assert f"{CORE}: `new` is new here: {lock.NAME} has it not for 1.0" in said


@pytest.mark.parametrize("how", ["older", "missing", "other release"])
def test_a_lock_that_is_out_of_date(how, project, monkeypatch, capsys):
    file = project / lock.NAME
    text = file.read_text()
    if how == "older":
        file.write_text(text.replace("CHOICES", "CHOICE"))
    else:
        other = text.replace("1.0", "0.9").replace(' = "', ' = "0')
        file.write_text(other if how == "other release" else "")
    monkeypatch.setattr(release, "download", lambda version, folder: None)
    commands = ["check"] if how == "older" else ["check", "wheel", "diff"]
    for command in commands:
        said = refused(capsys, project, command)
        assert "` is new here: " in said or "`run` is not the one of" in said
    if how != "other release":
        assert main(["lock"], project) == 0
        assert file.read_text() == text


# The check


def test_check_writes_nothing_and_imports_what_it_can(
    project, checkout, monkeypatch, capsys
):
    commit(checkout)
    git(checkout, "tag", "v1.0")
    before = snapshot(checkout)
    said = refused(capsys, project, "check", checkout, code=0)
    assert "not imported: no .venv has the packages of upstream v1.0" in said
    monkeypatch.setattr(check, "interpreter", lambda root, version: sys.executable)
    for tree in ([], [checkout]):
        said = refused(capsys, project, "check", *tree, code=0)
        assert "imported: 3 of 3 modules" in said
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
def test_check_finds(code, error, project, monkeypatch, capsys):
    monkeypatch.setattr(check, "interpreter", lambda root, version: sys.executable)
    write(project, {"python/sglang/trick.py": f'"""The trick."""\n\n{code}'})
    said = refused(capsys, project, "check", code=bool(error))
    assert error in said if error else "imported: 2 of 3 modules" in said
    assert "Traceback" not in said
