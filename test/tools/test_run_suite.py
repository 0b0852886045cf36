"""test/run_suite.py: nothing that failed, hung or did not run passes for a success."""

import pytest
import run_suite

REGISTER = "register_cpu_ci(est_time=5, suite='default')"
# The call is found in the source; sglang itself need not be imported.
HEADER = """
import atexit, os, signal, subprocess, sys, time, unittest
def register_cpu_ci(**_): pass
def register_cuda_ci(**_): pass
"""
PASSING = """
class TestPass(unittest.TestCase):
    def test_one(self): pass
    def test_two(self): subprocess.run("true", stdin=sys.stdin)
"""
MIXED = """
class TestMixed(unittest.TestCase):
    def test_good(self): pass
    @unittest.skip("needs <SM100>")
    def test_skip(self): pass
"""
FAILING = """
class TestFail(unittest.TestCase):
    def test_good(self): pass
    def test_bad(self): self.assertEqual(1, 2, "one is not two")
    def test_sub(self):
        for i in range(4):
            with self.subTest(i=i): self.assertEqual(i % 2, 0)
"""
HANGING = """
class TestHang(unittest.TestCase):
    def test_hang(self): time.sleep(600)
"""


@pytest.fixture
def add(tmp_path):
    """Writes a test file, with a registration."""

    def write(name: str, body: str, register: str = REGISTER) -> None:
        path = tmp_path / "registered" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{HEADER}{register}\n{body}\n")

    return write


@pytest.fixture
def run(tmp_path):
    """Runs the tool over these files."""
    folders = ["--root", f"{tmp_path}/registered", "--reports", f"{tmp_path}/reports"]
    return lambda *arguments: run_suite.main([*folders, *arguments])


def test_files_of_the_same_name(add, run, tmp_path, capsys):
    add("quant/test_a.py", PASSING)
    add("rl/test_a.py", MIXED)
    assert run() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "[1/2] quant/test_a.py ... 2 passed, 0 failed, 0 skipped"
    assert "    skipped: test_a.TestMixed.test_skip: needs <SM100>" in out
    assert out[-1] == "3 passed, 0 failed, 1 skipped"
    assert run_suite.main(["--total", f"{tmp_path}/reports"]) == 0
    assert capsys.readouterr().out == "3 passed, 0 failed, 1 skipped\n"


@pytest.mark.parametrize(
    "body, message, failed",
    [
        (FAILING, "failed: test_a.TestFail.test_bad: 1 != 2 : one is not two", 3),
        ("import no_such_module", "No module named 'no_such_module'", 1),
        (PASSING + "    def test_z(self): os._exit(0)", "no test was finished", 1),
        (PASSING + "atexit.register(os._exit, 3)", "exit status 3 after its tests", 1),
        ("os.kill(os.getpid(), 11)", "signal 11 (Segmentation fault)", 1),
        (HANGING, "in test_hang", 1),  # where it hung
    ],
)
def test_what_counts_as_failed(add, run, capsys, body, message, failed):
    add("test_a.py", body)
    add("test_b.py", PASSING)
    assert run("--timeout-per-file", "3") == 1
    out = capsys.readouterr().out
    assert message in out and ("timed out" in out) == (body == HANGING)
    assert f" {failed} failed, 0 skipped" in out.splitlines()[-1]
    assert "[2/2] test_b.py ... 2 passed" in out


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ("", 0, "[1/1] test_both.py"),
        ("--suite all", 0, "disabled: ROOT/test_off.py: see #7"),
        ("--hw cuda --suite all", 0, "3 passed, 0 failed, 1 skipped"),
        ("--registered-files", 0, "ROOT/test_both.py\nROOT/test_cuda.py\n"),
        ("--suite off", 2, "disabled: ROOT/test_off.py: see #7"),
        ("--suite nope", 2, "no file for cpu nope; suites: default, off, skips"),
        ("--suite skips", 2, "0 passed, 0 failed, 1 skipped"),
        ("ROOT/test_both.py", 0, "[1/1] test_both.py"),
        ("ROOT/test_cuda.py", 2, "not registered for this suite: ROOT/test_cuda.py"),
    ],
)
def test_selection(add, run, tmp_path, capsys, arguments, status, message):
    cuda = "register_cuda_ci(est_time=1, suite='one')"
    add("test_both.py", PASSING, f"{REGISTER}\n{cuda}")
    add("test_cuda.py", MIXED, cuda.replace("one", "two"))
    off = "register_cpu_ci(est_time=1, suite='off', disabled='see #7')"
    add("test_off.py", "raise SystemExit(9)", off)
    skips = "register_cpu_ci(est_time=1, suite='skips')"
    add("test_skips.py", "raise unittest.SkipTest('not here')", skips)
    add("test_not_registered.py", PASSING, "")
    root = f"{tmp_path}/registered"
    assert run(*arguments.replace("ROOT", root).split()) == status
    output = capsys.readouterr()
    told = (output.out + output.err).replace(root, "ROOT")
    assert message in told and "not_registered" not in told


@pytest.mark.parametrize(
    "text, status, summary",
    [
        ("<suite><testcase/></suite>", 0, "1 passed, 0 failed, 0 skipped"),
        ("<suite><testcase><error/></testcase></suite>", 1, "0 passed, 1 failed"),
        ("<suite>", 1, "part.xml: no test ran"),
        ("<suite/>", 1, "part.xml: no test ran"),
    ],
)
def test_total(tmp_path, capsys, text, status, summary):
    """A part in which nothing ran, or that is no report, is a failure."""
    part = tmp_path / "part.xml"
    part.write_text(text)
    assert run_suite.main(["--total", str(part)]) == status
    output = capsys.readouterr()
    assert summary in output.out + output.err
