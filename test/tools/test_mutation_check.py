"""scripts/mutation_check.py: its list fits our code, and it tells a kill from a survivor."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import mutation_check
import pytest

HALVE = {
    "breaks": "half is twice",
    "file": "maths.py",
    "find": "x // 2",
    "replace": "x * 2",
    "tests": ["test_maths.py"],
}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of one function, for a test below TESTS that calls it."""
    package = tmp_path / "site" / "little_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("def half(x):\n    return x // 2\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(mutation_check, "TESTS", tmp_path)
    return package


def check(package: Path, statement: str, timeout: float = 60, **changes) -> bool:
    """Check HALVE with `changes` by a test of this statement."""
    (mutation_check.TESTS / "test_maths.py").write_text(
        f"from little_package.maths import half\n\ndef test_half():\n    {statement}\n"
    )
    return mutation_check.check(package, {"halve": HALVE | changes}, 1, timeout)


def test_each_mutation_fits_the_installed_code_once():
    package = Path(importlib.util.find_spec("sglang").origin).parent
    mutations = mutation_check.read_mutations()
    assert len(mutations) >= 40
    for name, mutation in mutations.items():
        assert not mutation_check.misfit(package, mutation), name
        source = (package / mutation["file"]).read_text()
        mutated = source.replace(mutation["find"], mutation["replace"])
        assert mutated != source, name
        compile(mutated, mutation["file"], "exec")
        tests = mutation["tests"][0].partition("::")[0]
        assert (mutation_check.TESTS / tests).is_file(), name


@pytest.mark.parametrize(
    "statement, changes, is_killed, row",
    [
        ("assert half(4) == 2", {}, True, "killed by test_maths.test_half |"),
        ("assert half(0) == 0", {}, False, "| half is twice | maths.py | survived |"),
        ("assert half(4) == 3", {}, False, "killed by test_maths.test_half |"),
        ("assert half(4) == 2", {"replace": "x //"}, False, "pytest ended with 2"),
        (
            "assert half(4) == 2",
            {"find": "x"},
            False,
            "its text is 2 times in maths.py",
        ),
        ("assert half(4) == 2", {"file": "no.py"}, False, "there is no no.py"),
        ("import time; time.sleep(half(60))", {}, False, "pytest ended with None"),
    ],
)
def test_the_verdicts(package, capsys, statement, changes, is_killed, row):
    assert check(package, statement, timeout=5, **changes) == is_killed
    out = capsys.readouterr().out
    assert row in out
    # Where the tests fail already, nothing is mutated.
    is_unmutated = "| unmutated ['test_maths.py'] | survived |" in out
    assert is_unmutated == ("| halve |" in out)
    assert "x // 2" in (package / "maths.py").read_text()


def test_what_does_not_fit_is_named(package, capsys, monkeypatch):
    mutations = {"halve": HALVE, "gone": HALVE | {"find": "x / 2"}}
    monkeypatch.setattr(mutation_check, "read_mutations", lambda: mutations)
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for names, status in (["halve"], 0), ([], 1), (["gone"], 1), (["nothing"], 2):
        monkeypatch.setattr("sys.argv", ["mutation_check.py", "--fit", *names])
        try:
            assert mutation_check.main() == status
        except SystemExit as end:  # by argparse
            assert end.code == status
        out, err = capsys.readouterr()
        assert ("gone: its text is 0 times in maths.py" in out) == (status == 1)
        assert ("no mutation is called nothing" in err) == (status == 2)
