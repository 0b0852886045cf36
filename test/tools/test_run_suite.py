"""test/run_suite.py: what it selects, runs, reports and answers in each case."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import psutil
import pytest
import run_suite
from hypothesis import given
from hypothesis import strategies as st
from run_suite import Case, Counts, Ending, TestFile, describe_problem, main, partition

SCRIPT = Path(run_suite.__file__)
REGISTER = 'register_cpu_ci(est_time={}, suite="default")'
# The call is found in the source; sglang itself need not be imported.
HEADER = """
import os, signal, subprocess, sys, time, unittest
def register_cpu_ci(**_): pass
def register_cuda_ci(**_): pass
"""
PASSING = """
class TestPass(unittest.TestCase):
    def test_one(self): pass
    def test_two(self): self.assertEqual(os.environ["SGLANG_TEST_MAX_RETRY"], "0")
"""
FAILING = """
class TestFail(unittest.TestCase):
    def test_good(self): pass
    def test_bad(self): self.assertEqual(1, 2, "one is not two")
"""
MIXED = """
class TestMixed(unittest.TestCase):
    def test_good(self): pass
    @unittest.skip("needs <SM100>")
    def test_skip(self): pass
    @unittest.expectedFailure
    def test_expected(self): self.fail("as expected")
@unittest.skipUnless(False, "no model")
class TestSkipped(unittest.TestCase):
    def test_a(self): pass
    def test_b(self): pass
"""
# Where its grandchild's number is written; it ignores SIGTERM if told to.
HANGING = """
PROGRAM = "import signal, time; {}; print(flush=True); time.sleep(600)"
class TestHang(unittest.TestCase):
    def test_hang(self):
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE
        )
        child.stdout.readline()
        with open(__file__ + ".pid.partial", "w") as f:
            f.write(str(child.pid))
        os.rename(__file__ + ".pid.partial", __file__ + ".pid")
        {}
"""
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


class Tree:
    """A folder of test files, its reports, and runs of the tool over it."""

    def __init__(self, path: Path):
        self.root = path / "registered"
        self.reports = path / "reports"
        self.root.mkdir()

    def add(self, name: str, body: str, register: str = REGISTER.format(5)) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{HEADER}{register}\n{body}\n")
        return path

    def arguments(self, *arguments: str) -> list[str]:
        folders = ["--root", str(self.root), "--reports", str(self.reports)]
        return [*folders, *arguments]

    def run(self, *arguments: str) -> int:
        return main(self.arguments(*arguments))

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        command = [sys.executable, SCRIPT, *self.arguments(*arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, process_group=0, **options
        )

    def summary(self) -> dict:
        return json.loads((self.reports / "summary.json").read_text())

    def counts(self) -> tuple[int, int, int]:
        summary = self.summary()
        return summary["passed"], summary["failed"], summary["skipped"]

    def report(self, name: str) -> ET.Element:
        return ET.parse(self.reports / name).getroot()


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def last_line(capsys) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def assert_gone(pid_file: Path) -> None:
    try:
        status = psutil.Process(int(pid_file.read_text())).status()
    except psutil.NoSuchProcess:
        return
    assert status == psutil.STATUS_ZOMBIE  # where nothing reaps orphans


# --- Running ---------------------------------------------------------------------------


def test_passing_files_of_the_same_name(tree, capsys):
    tree.add("quant/test_a.py", PASSING)
    tree.add("rl/test_a.py", MIXED)
    assert tree.run() == 0
    out = capsys.readouterr().out
    assert "[1/2] quant/test_a.py ... passed 2 (" in out
    assert "[2/2] rl/test_a.py ... passed 1, skipped 4 (" in out
    assert "skipped 2: rl/test_a.py: no model\n" in out
    assert "skipped 1: rl/test_a.py: needs <SM100>\n" in out
    assert out.splitlines()[-1] == "3 passed, 0 failed, 4 skipped"
    assert tree.counts() == (3, 0, 4)
    report = tree.report("quant/test_a.xml")
    names = [case.get("classname") for case in report.iter("testcase")]
    assert names == ["quant.test_a.TestPass"] * 2
    files = sorted(path.name for path in tree.reports.rglob("*.*"))
    assert files == ["summary.json"] + ["test_a.log"] * 2 + ["test_a.xml"] * 2


def test_failures(tree, capsys):
    tree.add("test_a.py", FAILING)
    tree.add("test_b.py", PASSING)
    assert tree.run() == 1
    out = capsys.readouterr().out
    assert "[1/2] test_a.py ... FAILED: passed 1, failed 1 (" in out
    assert "AssertionError: 1 != 2 : one is not two" in out  # the log's end
    assert "failed: test_a.py: test_a.TestFail.test_bad: 1 != 2 : one is not two" in out
    assert out.splitlines()[-1] == "3 passed, 1 failed, 0 skipped"
    assert tree.report("test_a.xml").get("failures") == "1"


@pytest.mark.parametrize(
    "body, failed, passed",
    [
        (
            """
class TestSub(unittest.TestCase):
    def test_sub(self):
        for i in range(4):
            with self.subTest(i=i):
                self.assertEqual(i % 2, 0)
""",
            ["test_sub (i=1)", "test_sub (i=3)"],
            0,
        ),
        (
            """
class TestClass(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise OSError("no server")
    def test_a(self): pass
""",
            ["no server"],
            0,
        ),
        (
            """
class TestSurprise(unittest.TestCase):
    @unittest.expectedFailure
    def test_a(self): pass
    def test_b(self): pass
""",
            ["Unexpected success"],
            1,
        ),
    ],
)
def test_what_else_counts_as_failed(tree, capsys, body, failed, passed):
    tree.add("test_a.py", body)
    assert tree.run() == 1
    assert tree.counts() == (passed, len(failed), 0)
    out = capsys.readouterr().out
    for words in failed:
        assert words in out


@pytest.mark.parametrize(
    "body, problem, passed",
    [
        ("import no_such_module", "exit status 1 before its tests were finished", 0),
        ("sys.exit(0)", "exit status 0 before its tests were finished", 0),
        ("os._exit(3)", "exit status 3 before its tests were finished", 0),
        ("os.kill(os.getpid(), 11)", "signal 11 (Segmentation fault) before", 0),
        (PASSING + "import atexit; atexit.register(os._exit, 3)", "3 after its", 2),
        ("def test_function(): pass", "no tests in it", 0),
        (
            PASSING + "    def test_z(self): print('last words'); os._exit(0)",
            "exit status 0 before its tests were finished",
            0,
        ),
    ],
)
def test_files_that_fail_as_a_whole(tree, capsys, body, problem, passed):
    tree.add("test_a.py", body)
    assert tree.run() == 1
    assert problem in capsys.readouterr().out
    assert tree.counts() == (passed, 1, 0)
    report = tree.report("test_a.xml")
    assert report.get("tests") == str(passed + 1)
    error = report.find(".//error")
    assert problem in error.get("message")
    if "last words" in body:
        assert "last words" in error.text
    if "no_such" in body:
        assert "ModuleNotFoundError: No module named 'no_such_module'" in error.text


def test_module_that_skips_itself(tree, capsys):
    tree.add("test_a.py", "raise unittest.SkipTest('not here')")
    tree.add("test_b.py", PASSING)
    assert tree.run() == 0
    assert "skipped 1: test_a.py: not here\n" in capsys.readouterr().out
    assert tree.counts() == (2, 0, 1)


def test_file_that_runs_itself_and_pickles_its_classes(tree):
    tree.add(
        "test_a.py",
        """
import multiprocessing
def double(number): return 2 * number
class TestSelf(unittest.TestCase):
    def test_self(self):
        text = subprocess.check_output([sys.executable, __file__, "again"], text=True)
        self.assertEqual(text, "again\\n")
    def test_arguments(self):
        self.assertEqual(sys.argv, [__file__])
        self.assertEqual(sys.path[0], os.path.dirname(__file__))
    def test_output(self):
        subprocess.run(["echo", "from a program"], stdout=sys.stdout, check=True)
    def test_spawn(self):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            self.assertEqual(pool.map(double, [1, 2]), [2, 4])
if __name__ == "__main__":
    print(*sys.argv[1:])
""",
    )
    assert tree.run() == 0
    assert tree.counts() == (4, 0, 0)
    assert "from a program" in (tree.reports / "test_a.log").read_text()


# --- Stopping --------------------------------------------------------------------------


@pytest.mark.parametrize("reaction", ["pass", IGNORE])
def test_hang_with_a_grandchild(tree, capsys, monkeypatch, reaction):
    monkeypatch.setattr(run_suite, "GRACE_S", 0.3)
    path = tree.add("test_a.py", HANGING.format(reaction, "child.wait()"))
    tree.add("test_b.py", PASSING)
    assert tree.run("--timeout-per-file", "3") == 1
    out = capsys.readouterr().out
    assert "[1/2] test_a.py ... FAILED: failed 1 (" in out
    assert "timed out after 3 s" in out
    assert "in test_hang" in out  # where it hung
    assert tree.counts() == (2, 1, 0)
    assert_gone(Path(f"{path}.pid"))


def test_what_a_passing_file_leaves_behind_is_ended(tree):
    path = tree.add("test_a.py", HANGING.format("pass", "pass"))
    assert tree.run() == 0
    assert_gone(Path(f"{path}.pid"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(tree, number):
    path = tree.add("test_a.py", HANGING.format("pass", "child.wait()"))
    tree.add("test_b.py", PASSING)
    # These tests may run in the background themselves, where SIGINT is ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with tree.start("--timeout-per-file", "90", preexec_fn=heed) as process:
        wait_for(Path(f"{path}.pid"))
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == -number
    assert f"interrupted by {number.name}" in out
    assert "not run: test_b.py" in out
    assert out.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"
    assert_gone(Path(f"{path}.pid"))
    assert tree.report("test_a.xml").find(".//error") is not None
    assert run_suite.read_part(tree.reports / "summary.json")[1] == "interrupted"


def test_sigint_works_in_tests_of_a_run_in_the_background(tree):
    tree.add(
        "test_a.py",
        """
class TestInterrupt(unittest.TestCase):
    def test_own(self):
        with self.assertRaises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    def test_program(self):
        with subprocess.Popen(["sleep", "60"]) as process:
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(5), -signal.SIGINT)
""",
    )
    ignore = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = tree.start()
    finally:
        signal.signal(signal.SIGINT, ignore)
    out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"
    assert process.returncode == 0


# --- Retries ---------------------------------------------------------------------------

FLAKY = """
class TestFlaky(unittest.TestCase):
    def test_good(self): pass
    def test_flaky(self):
        with open(__file__ + ".runs", "a+") as f:
            f.write("x")
            self.assertGreaterEqual(f.tell(), {})
"""


def test_retry_that_helps(tree, capsys):
    tree.add("test_a.py", FLAKY.format(2))
    assert tree.run("--retry", "2") == 0
    out = capsys.readouterr().out
    assert "[1/1] test_a.py ... FAILED: passed 1, failed 1 (" in out
    assert "[1/1] test_a.py failed and is retried\n" in out
    assert "[1/1] test_a.py (attempt 2 of 3) ... passed 2 (" in out
    assert "retried: test_a.py: 2 attempts, passed at last\n" in out
    assert tree.counts() == (2, 0, 0)
    first, second = tree.summary()["files"][0]["attempts"]
    assert [case["outcome"] for case in first["cases"]].count("failed") == 1
    assert len(second["cases"]) == 2
    assert tree.report("test_a.xml").get("attempts") == "2"
    assert "attempt 1" in (tree.reports / "test_a.log").read_text()


def test_retry_that_does_not_help(tree, capsys):
    tree.add("test_a.py", FAILING)
    assert tree.run("--retry", "1") == 1
    out = capsys.readouterr().out
    assert "retried: test_a.py: 2 attempts, failed every time\n" in out
    assert out.splitlines()[-1] == "1 passed, 1 failed, 0 skipped"


def test_no_retry_unless_asked(tree, capsys):
    tree.add("test_a.py", FLAKY.format(2))
    assert tree.run() == 1
    assert "retried" not in capsys.readouterr().out


# --- Selecting -------------------------------------------------------------------------


@pytest.fixture
def suites(tree) -> Tree:
    cuda = 'register_cuda_ci(est_time={}, suite="{}")'
    tree.add("test_both.py", PASSING, f"{REGISTER.format(9)}\n{cuda.format(1, 'one')}")
    tree.add("test_cuda.py", PASSING, cuda.format(2, "two"))
    off = 'register_cpu_ci(est_time=1, suite="default", disabled="see #7")'
    tree.add("test_off.py", "raise SystemExit(9)", off)
    gone = 'register_cpu_ci(est_time=1, suite="gone", disabled="see #8")'
    tree.add("test_gone.py", "raise SystemExit(9)", gone)
    late = 'register_cpu_ci(est_time=1, suite="default", nightly=True)'
    tree.add("test_late.py", PASSING, late)
    tree.add("test_not_registered.py", PASSING, "")
    tree.add("helper.py", "", "")
    return tree


@pytest.mark.parametrize(
    "arguments, files",
    [
        ([], ["test_both.py (9 s)"]),
        (["--nightly"], ["test_late.py (1 s)"]),
        (["--hw", "cuda", "--suite", "one"], ["test_both.py (1 s)"]),
        (
            ["--hw", "cuda", "--suite", "all"],
            ["test_both.py (1 s)", "test_cuda.py (2 s)"],
        ),
    ],
)
def test_list(suites, capsys, arguments, files):
    assert suites.run("--list", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(files)] == files
    assert lines[-2] == "not registered: test_not_registered.py"
    assert ("disabled: test_off.py: see #7" in lines) == (not arguments)
    assert not suites.reports.exists()


def test_disabled_files_are_listed_and_not_run(suites, capsys):
    assert suites.run() == 0
    out = capsys.readouterr().out
    assert "[1/1] test_both.py" in out
    assert "disabled: test_off.py: see #7\n" in out
    assert suites.summary()["disabled"] == {"test_off.py": "see #7"}
    assert suites.summary()["unregistered"] == ["test_not_registered.py"]


def test_registered_files(suites, capsys):
    assert suites.run("--registered-files") == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    kinds = ["both", "cuda", "gone", "late", "off"]
    assert names == [f"test_{kind}.py" for kind in kinds]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "nope"], "--hw cpu --suite nope; suites: default, gone"),
        (["--hw", "cuda"], "--hw cuda --suite default; suites: one, two"),
        (["--suite", "gone"], "every file is disabled: test_gone.py: see #8"),
        (["test_cuda.py"], "not registered for this suite under"),
        (["--root", "/nonexistent"], "suites: none"),
    ],
)
def test_nothing_to_run(suites, capsys, arguments, message):
    assert suites.run(*arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("run_suite.py: ")
    assert output.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--auto-partition-id", "0"],
        ["--auto-partition-id", "2", "--auto-partition-size", "2"],
        ["--retry", "-1"],
        ["--timeout-per-file", "0"],
        ["--hw", "tpu"],
    ],
)
def test_wrong_arguments(suites, arguments):
    with pytest.raises(SystemExit) as error:
        suites.run(*arguments)
    assert error.value.code == 2


@pytest.mark.parametrize(
    "source", ["def broken(:", "register_cpu_ci(est_time=unknown, suite='default')"]
)
def test_registration_that_cannot_be_read(tree, capsys, source):
    tree.add("test_a.py", "", source)
    assert tree.run() == 2
    assert "cannot read registrations" in capsys.readouterr().err


def test_only_skips_is_not_success(tree, capsys):
    tree.add("test_a.py", "raise unittest.SkipTest('not here')")
    assert tree.run() == 2
    assert capsys.readouterr().out.endswith(
        "No test ran\n0 passed, 0 failed, 1 skipped\n"
    )


def test_named_files(tree, capsys, monkeypatch):
    path = tree.add("quant/test_a.py", PASSING)
    tree.add("test_b.py", FAILING)
    assert tree.run(str(path)) == 0
    assert tree.run("quant/test_a.py") == 0
    monkeypatch.chdir(path.parent)
    assert tree.run("test_a.py") == 0
    assert capsys.readouterr().out.count("[1/1] quant/test_a.py") == 3


def test_shards(tree, capsys):
    tree.add("test_a.py", PASSING)
    tree.add("test_b.py", MIXED)
    seen = []
    for index in range(2):
        shard = "--auto-partition-id", str(index), "--auto-partition-size", "3"
        assert tree.run(*shard) == 0
        seen += [file["file"] for file in tree.summary()["files"]]
    assert sorted(seen) == ["test_a.py", "test_b.py"]
    capsys.readouterr()
    assert tree.run("--auto-partition-id", "2", "--auto-partition-size", "3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "This shard is empty: the 2 files are in other shards",
        "0 passed, 0 failed, 0 skipped",
    ]


@given(
    st.lists(st.floats(0, 1000), max_size=12),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_every_file_is_in_one_shard_and_loads_are_balanced(times, size, random):
    files = [TestFile(f"test_{i}.py", time) for i, time in enumerate(times)]
    shards = [partition(files, index, size) for index in range(size)]
    together = [file for shard in shards for file in shard]
    assert sorted(together, key=files.index) == files
    shuffled = random.sample(files, len(files))
    assert shards == [partition(shuffled, index, size) for index in range(size)]
    loads = [sum(file.est_time for file in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(times, default=0) + 1e-6


def test_problem_of_an_exit_status_without_reason():
    passed = [Case("a", "passed")]
    failed = [Case("a", "failed")]
    assert describe_problem(Ending(0), passed) is None
    assert describe_problem(Ending(1), failed) is None
    assert "no test failed" in describe_problem(Ending(1), passed)
    assert "signal 9 (Killed) after" in describe_problem(Ending(-9), failed)


# --- The total -------------------------------------------------------------------------

JUNIT = """<?xml version="1.0"?><testsuites><testsuite tests="99">
<testcase classname="a" name="b"/><testcase name="c"><failure message="m"/></testcase>
<testcase name="d"><error/></testcase><testcase name="e"><skipped message="why"/></testcase>
</testsuite></testsuites>"""
GOOD = '<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>'


def test_total(tree, tmp_path, capsys):
    tree.add("test_a.py", MIXED)
    assert tree.run() == 0
    summary = str(tree.reports / "summary.json")
    good, bad = tmp_path / "good.xml", tmp_path / "bad.xml"
    good.write_text(GOOD)
    bad.write_text(JUNIT)
    assert main(["--total", summary, str(good)]) == 0
    assert last_line(capsys) == "2 passed, 0 failed, 4 skipped"
    assert main(["--total", summary, str(good), str(bad)]) == 1
    assert last_line(capsys) == "3 passed, 2 failed, 5 skipped"


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("a.xml", None, "no report"),
        ("a.xml", "<testsuites>", "no report"),
        ("a.xml", "<testsuites/>", "no test ran"),
        ("a.json", None, "no summary"),
        ("a.json", "{", "no summary"),
    ],
)
def test_total_of_a_part_that_did_not_run(tmp_path, capsys, name, text, problem):
    (tmp_path / "good.xml").write_text(GOOD)
    part = tmp_path / name
    if text is not None:
        part.write_text(text)
    assert main(["--total", str(tmp_path / "good.xml"), str(part)]) == 1
    output = capsys.readouterr()
    assert output.err == f"run_suite.py: {part}: {problem}\n"
    assert output.out == "1 passed, 0 failed, 0 skipped\n"


def test_stale_reports_are_not_taken_for_new_ones(tree):
    path = tree.add("test_a.py", PASSING)
    assert tree.run() == 0
    report = (tree.reports / "test_a.xml").read_text()
    (tree.reports / "test_a.child").write_text(report)  # a killed runner's
    path.write_text(path.read_text().replace(PASSING, "os._exit(3)"))
    assert tree.run() == 1
    assert tree.counts() == (0, 1, 0)
    assert (tree.reports / "test_a.log").read_text() == "===== attempt 1 of test_a.py\n"


def test_counts():
    assert str(Counts(1, 2, 3) + Counts(1, 0, 0)) == "2 passed, 2 failed, 3 skipped"


def test_help_states_the_exit_statuses():
    result = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    for words in "exit status:", "no file of a suite", "--retry", "--reports":
        assert words in result.stdout
    assert os.access(SCRIPT, os.X_OK)
