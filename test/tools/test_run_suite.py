"""test/run_suite.py: what it selects, runs, reports and answers in each case."""

import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import psutil
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
    @unittest.expectedFailure
    def test_expected(self): self.fail("as expected")
"""
FAILING = """
class TestFail(unittest.TestCase):
    def test_good(self): pass
    def test_bad(self): self.assertEqual(1, 2, "one is not two")
    @unittest.expectedFailure
    def test_surprise(self): pass
    def test_sub(self):
        for i in range(4):
            with self.subTest(i=i): self.assertEqual(i % 2, 0)
"""
# Writes where its child's number is; the child ignores SIGTERM.
CHILD = """
PROGRAM = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
class TestChild(unittest.TestCase):
    def test_child(self):
        child = subprocess.Popen([sys.executable, "-c", PROGRAM])
        with open(__file__ + ".partial", "w") as file: file.write(str(child.pid))
        os.rename(__file__ + ".partial", __file__ + ".pid")
        {}
"""
HANGING = CHILD.format("child.wait()")


class Tree:
    """A folder of test files, and runs of the tool over it."""

    def __init__(self, path: Path):
        self.root, self.reports = path / "registered", path / "reports"
        self.folders = ["--root", str(self.root), "--reports", str(self.reports)]

    def add(self, name: str, body: str, register: str = REGISTER) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{HEADER}{register}\n{body}\n")
        return path

    def run(self, *arguments: str) -> int:
        return run_suite.main([*self.folders, *arguments])


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def waited_for(condition) -> bool:
    return any(condition() or time.sleep(0.05) for _ in range(600))


def is_gone(test: Path) -> bool:
    try:
        status = psutil.Process(int(Path(f"{test}.pid").read_text())).status()
    except psutil.NoSuchProcess:
        return True
    return status == psutil.STATUS_ZOMBIE  # where nothing reaps orphans


def test_passing_files_of_the_same_name(tree, capsys):
    tree.add("quant/test_a.py", PASSING)
    tree.add("rl/test_a.py", MIXED)
    assert tree.run() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "[1/2] quant/test_a.py ... 2 passed, 0 failed, 0 skipped"
    assert "    skipped: test_a.TestMixed.test_skip: needs <SM100>" in out
    assert out[-1] == "3 passed, 0 failed, 2 skipped"
    files = sorted(path.name for path in tree.reports.rglob("*.*"))
    assert files == ["test_a.log"] * 2 + ["test_a.xml"] * 2


LAST_WORDS = PASSING + "    def test_z(self): print('last words'); os._exit(0)"


@pytest.mark.parametrize(
    "body, message, failed",
    [
        (FAILING, "failed: test_a.TestFail.test_bad: 1 != 2 : one is not two", 4),
        (FAILING, "failed: test_a.TestFail.test_sub (i=3)", 4),
        ("import no_such_module", "No module named 'no_such_module'", 1),
        ("sys.exit(0)", "SystemExit: 0", 1),
        (LAST_WORDS, "last words", 1),
        (PASSING + "atexit.register(os._exit, 3)", "exit status 3 after its tests", 1),
        ("os.kill(os.getpid(), 11)", "signal 11 (Segmentation fault)", 1),
        ("def test_function(): pass", "no test was finished", 1),
        (HANGING, "in test_child", 1),  # where it hung
        (CHILD.format("pass"), "2 passed", 0),  # what it leaves behind is ended
    ],
)
def test_what_counts_as_failed(tree, capsys, body, message, failed):
    path = tree.add("test_a.py", body)
    tree.add("test_b.py", PASSING)
    assert tree.run("--timeout-per-file", "3") == int(failed > 0)
    out = capsys.readouterr().out
    assert message in out and ("timed out" in out) == (body == HANGING)
    assert f" {failed} failed, 0 skipped" in out.splitlines()[-1]
    assert "[2/2] test_b.py ... 2 passed" in out
    report = ET.parse(tree.reports / "test_a.xml")
    assert len(report.findall(".//*[@message]")) == failed
    assert "TestChild" not in body or waited_for(lambda: is_gone(path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(tree, number):
    path = tree.add("test_a.py", HANGING)
    # These tests may run in the background themselves, where SIGINT is ignored.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, run_suite.__file__, *tree.folders]
    with subprocess.Popen(command, preexec_fn=heed) as process:
        assert waited_for(Path(f"{path}.pid").exists)
        process.send_signal(number)
        assert process.wait(30) == -number
    assert waited_for(lambda: is_gone(path))


def test_only_skips_are_no_success(tree, capsys):
    tree.add("test_a.py", "raise unittest.SkipTest('not here')")
    assert tree.run() == 2
    assert capsys.readouterr().out.endswith("0 passed, 0 failed, 1 skipped\n")


@pytest.fixture
def suites(tree) -> Tree:
    cuda = "register_cuda_ci(est_time=1, suite='one')"
    tree.add("test_both.py", PASSING, f"{REGISTER}\n{cuda}")
    tree.add("test_cuda.py", MIXED, cuda.replace("one", "two"))
    off = "register_cpu_ci(est_time=1, suite='off', disabled='see #7')"
    tree.add("test_off.py", "raise SystemExit(9)", off)
    tree.add("test_not_registered.py", PASSING, "")
    return tree


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ("", 0, "[1/1] test_both.py"),
        ("--suite all", 0, "disabled: ROOT/test_off.py: see #7"),
        ("--suite all ROOT/test_both.py", 0, "[1/1] test_both.py"),
        ("--hw cuda --suite all", 0, "3 passed, 0 failed, 2 skipped"),
        (
            "--registered-files",
            0,
            "ROOT/test_both.py\nROOT/test_cuda.py\nROOT/test_off",
        ),
        ("--suite off", 2, "disabled: ROOT/test_off.py: see #7"),
        ("--suite nope", 2, "no file for cpu nope; suites: default, off"),
        ("--hw cuda", 2, "suites: one, two"),
        ("ROOT/test_cuda.py", 2, "not registered for this suite: ROOT/test_cuda.py"),
        ("--auto-partition-id 2 --auto-partition-size 2", 2, "not in 0..N-1"),
        ("--auto-partition-id 1 --auto-partition-size 2", 0, "0 passed, 0 failed"),
        ("--hw tpu", 2, "invalid choice: 'tpu'"),
        ("--help", 0, "exit status:"),
    ],
)
def test_selection(suites, capsys, arguments, status, message):
    root = str(suites.root)
    try:
        assert suites.run(*arguments.replace("ROOT", root).split()) == status
    except SystemExit as end:  # by argparse
        assert end.code == status
    output = capsys.readouterr()
    assert message.replace("ROOT", root) in output.out + output.err
    assert "not_registered" not in output.out


@pytest.mark.parametrize("call", ["def broken(:", "register_cpu_ci(est_time=x)"])
def test_registration_that_cannot_be_read(tree, capsys, call):
    tree.add("test_a.py", "", call)
    assert tree.run() == 2
    assert capsys.readouterr().err.startswith("run_suite.py: ")


def test_every_file_is_in_one_shard_and_loads_are_balanced():
    times = enumerate([0, 1, 7, 7, 30, 2.5, 100, 90, 3])
    files = [SimpleNamespace(filename=str(i), est_time=time) for i, time in times]
    shards = [run_suite.partition(files, index, 3) for index in range(3)]
    assert sorted(f.filename for shard in shards for f in shard) == [*"012345678"]
    assert [sum(f.est_time for f in shard) for shard in shards] == [100, 90, 50.5]
    assert shards == [run_suite.partition(files[::-1], index, 3) for index in range(3)]


@pytest.mark.parametrize(
    "text, status, passed, failed",
    [
        ("<suite><testcase/></suite>", 0, 4, 0),
        ("<suite><testcase><error/></testcase></suite>", 1, 3, 1),
        ("<suite>", 1, 3, 0),
        ("<suite/>", 1, 3, 0),
        ("", 1, 3, 0),
    ],
)
def test_total(suites, tmp_path, capsys, text, status, passed, failed):
    """A part in which nothing ran, or that is no report, is a failure."""
    suites.run("--hw", "cuda", "--suite", "all")
    part = tmp_path / "part.xml"
    part.write_text(text)
    assert run_suite.main(["--total", str(suites.reports), str(part)]) == status
    out, err = capsys.readouterr()
    assert out.endswith(f"\n{passed} passed, {failed} failed, 2 skipped\n")
    assert (f"{part}: no test ran" in err) == (passed + failed == 3)
