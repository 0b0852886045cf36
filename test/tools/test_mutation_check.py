"""scripts/mutation_check.py: its list fits our code, and it tells a kill from a survivor."""

import re
from pathlib import Path

import mutation_check
import pytest
from mutation_check import MUTATIONS, Mutation, check, check_all, main, mutated

HALVE = Mutation(
    "halve", "half is twice", "maths.py", "x // 2", "x * 2", ("test_maths.py",)
)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package of one function, beside a test that calls it with one number."""
    package = tmp_path / "site" / "little_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("def half(x):\n    return x // 2\n")
    write_test(tmp_path, "assert half(4) == 2")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(mutation_check, "ROOT", tmp_path)
    # The tests' Python finds the plugin there, as it finds it in the real root.
    (tmp_path / "scripts").symlink_to(Path(mutation_check.__file__).parent)
    return package


def write_test(directory: Path, statement: str) -> None:
    (directory / "test_maths.py").write_text(
        f"from little_package.maths import half\n\n\ndef test_half():\n    {statement}\n"
    )


def test_each_mutation_fits_the_installed_code_once():
    package = mutation_check.installed_package()
    for mutation in MUTATIONS:
        source = (package / mutation.file).read_text()
        compile(mutated(mutation, source), mutation.file, "exec")


def test_the_list():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) >= 10 and len(set(names)) == len(names)
    for mutation in MUTATIONS:
        file = mutation.tests[0].partition("::")[0]
        assert (mutation_check.ROOT / file).is_file(), file
        assert mutation.old != mutation.new


def test_text_that_is_not_there_once_is_refused():
    for source in ("", "x // 2, x // 2"):
        with pytest.raises(ValueError, match="halve: its text is [02] times"):
            mutated(HALVE, source)


def test_a_kill_names_the_first_test_that_fails(package):
    assert check(package, None, HALVE.tests, 60).status == "survived"
    result = check(package, HALVE, HALVE.tests, 60)
    assert (result.status, result.detail) == ("killed", "test_maths.py::test_half")
    assert "x // 2" in (package / "maths.py").read_text()


def test_a_survivor_is_told(package, tmp_path):
    write_test(tmp_path, "assert half(0) == 0")
    assert check(package, HALVE, HALVE.tests, 60).status == "survived"


def test_what_breaks_more_than_tests_is_an_error(package, tmp_path):
    broken = Mutation("broken", "", "maths.py", "x // 2", "x //", HALVE.tests)
    assert check(package, broken, HALVE.tests, 60).status == "error"
    write_test(tmp_path, "import time; time.sleep(60)")
    assert "not done after 1 s" in check(package, HALVE, HALVE.tests, 1).detail


def test_another_package_than_the_copy_is_an_error(package, tmp_path):
    add_path = f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
    test = tmp_path / "test_maths.py"
    test.write_text(add_path + test.read_text())
    result = check(package, HALVE, HALVE.tests, 60)
    assert result.status == "error"
    assert re.search("import .*little_package.* not the copy", result.detail)


def test_nothing_is_mutated_when_the_tests_fail_already(package, tmp_path):
    write_test(tmp_path, "assert half(4) == 3")
    results = dict(check_all(package, [HALVE], 60))
    assert list(results) == ["unmutated: test_maths.py"]


@pytest.mark.parametrize("statement, status", [("4) == 2", 0), ("0) == 0", 1)])
def test_the_exit_status_and_the_page(
    package, tmp_path, monkeypatch, statement, status
):
    write_test(tmp_path, f"assert half({statement}")
    monkeypatch.setattr(mutation_check, "MUTATIONS", (HALVE,))
    monkeypatch.setattr(mutation_check, "installed_package", lambda: package)
    page = tmp_path / "page.md"
    assert main(["--only", "halve", "--output", str(page)]) == status
    verdict = "**survived**" if status else "`test_maths.py::test_half`"
    assert f"| halve | half is twice | maths.py | {verdict} |" in page.read_text()


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
    assert "no mutation is called nothing" in capsys.readouterr().err
