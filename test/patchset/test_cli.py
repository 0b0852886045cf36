"""The commands, on a small upstream: wheel, diff, apply, check, and their errors."""

import zipfile

import pytest
from overlay.cli import main
from small_upstream import OVERLAY, UPSTREAM, commit, git, snapshot, write


def test_wheel(project, tmp_path, capsys):
    assert main(["wheel", "--output", str(tmp_path / "out")], project) == 0
    output = capsys.readouterr()
    wheel = tmp_path / "out/sglang-1.0+mxfp8.3-py3-none-any.whl"
    assert output.out == f"{wheel}\n"
    assert "+2     -1  python/sglang/core.py" in output.err
    assert "test_trick" not in output.err
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "sglang/trick.py" in names and "sglang-1.0.dist-info/RECORD" not in names
        version = archive.read("sglang/_version.py").decode()
        metadata = archive.read("sglang-1.0+mxfp8.3.dist-info/METADATA").decode()
    assert "'1.0+mxfp8.3'" in version and "(1, 0, 'mxfp8.3')" in version
    assert "Version: 1.0+mxfp8.3\nRequires-Dist: flashinfer_python==2.0\n" in metadata
    first = wheel.read_bytes()
    main(["wheel", "--output", str(tmp_path / "out")], project)
    assert wheel.read_bytes() == first


def test_wheel_of_another_sha256_is_refused(project, capsys):
    with zipfile.ZipFile(
        project / ".cache/sglang-1.0-py3-none-any.whl", "a"
    ) as archive:
        archive.writestr("sglang/more.py", "")
    assert main(["check"], project) == 1
    assert "sha256" in capsys.readouterr().err


def test_diff_against_the_release(project, tmp_path, capsys):
    patch = tmp_path / "out.patch"
    assert main(["diff", "--output", str(patch)], project) == 0
    assert "skipped  test/registered/test_core.py" in capsys.readouterr().err
    text = patch.read_text()
    assert "Subject: Teach the package a trick\n\nIt was asked for.\n" in text
    assert "- CHOICES, run: b is faster (org/repo#7)\n" in text
    assert "until" not in text
    assert "b/test/registered/test_trick.py" in text
    again = tmp_path / "again.patch"
    main(["diff", "--output", str(again)], project)
    assert again.read_bytes() == patch.read_bytes()


def test_diff_against_a_checkout(project, checkout, tmp_path):
    commit(checkout)
    before = snapshot(checkout)
    patch = tmp_path / "out.patch"
    assert main(["diff", "--tree", str(checkout), "--output", str(patch)], project) == 0
    assert snapshot(checkout) == before
    git(checkout, "apply", "--check", str(patch))
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


def test_apply_twice_changes_nothing_more(project, checkout, capsys):
    assert main(["apply", str(checkout)], project) == 0
    patched = snapshot(checkout)
    assert "python/sglang/trick.py" in patched
    capsys.readouterr()
    for command in ("apply", "check"):
        assert main([command, str(checkout)], project) == 0
        assert "already applied; nothing to do" in capsys.readouterr().err
    assert snapshot(checkout) == patched


def test_apply_keeps_file_modes(project, checkout):
    (checkout / "python/sglang/core.py").chmod(0o755)
    assert main(["apply", str(checkout)], project) == 0
    assert (checkout / "python/sglang/core.py").stat().st_mode & 0o777 == 0o755


def test_check_writes_nothing(project, checkout, capsys):
    before = snapshot(checkout)
    assert main(["check", str(checkout)], project) == 0
    assert "+0     -4  python/sglang/other.py" in capsys.readouterr().err
    assert snapshot(checkout) == before


def test_half_applied_tree_is_refused(project, checkout, capsys):
    other = UPSTREAM["sglang/other.py"].partition("def kept")
    write(checkout, {"python/sglang/other.py": "".join(other[1:])})
    before = snapshot(checkout)
    assert main(["apply", str(checkout)], project) == 1
    errors = capsys.readouterr().err
    assert "other.py: upstream checkout has no `helper` to drop" in errors
    assert "already in this tree: if it was patched in part, restore it first" in errors
    assert snapshot(checkout) == before


def test_errors_are_collected_and_nothing_is_written(project, checkout, capsys):
    core = OVERLAY["python/sglang/core.py"]
    write(project, {"python/sglang/core.py": core.replace("run", "runs")})
    write(checkout, {"docs/options.md": "nothing", "python/pyproject.toml": ""})
    before = snapshot(checkout)
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "base")
    git(checkout, "tag", "v1.1")
    assert main(["apply", str(checkout)], project) == 1
    told = capsys.readouterr().err
    for error in (
        "python/sglang/core.py: upstream v1.1 has no `runs` to prepend to",
        "python/pyproject.toml: upstream v1.1 has no match for",
    ):
        assert error in told
    assert "skipped  docs/options.md" in told
    assert "2 errors; nothing is written" in told
    assert snapshot(checkout) == before


def test_a_page_that_is_not_there_is_skipped(project, checkout, capsys):
    (checkout / "docs/options.md").unlink()
    assert main(["check", str(checkout)], project) == 0
    assert "skipped  docs/options.md" in capsys.readouterr().err


def test_a_file_to_edit_must_be_there(project, checkout, capsys):
    (checkout / "python/sglang/core.py").unlink()
    (checkout / "python/sglang/trick.py").write_text("VALUE = 3\n")
    assert main(["check", str(checkout)], project) == 1
    told = capsys.readouterr().err
    assert "core.py: upstream checkout has no such file to merge into" in told
    assert (
        "trick.py: upstream checkout has this file, and the overlay's has no ledger"
        in told
    )


def test_what_is_no_checkout(project, tmp_path, capsys):
    assert main(["apply", str(tmp_path)], project) == 1
    assert "is not a checkout of sglang" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["apply"], ["check", ".", "--release", "1"], []])
def test_usage(arguments, project):
    with pytest.raises(SystemExit):
        main(arguments, project)
