"""test/run_suite.py: nothing that failed, hung or did not run passes for a success."""

import pytest
import run_suite

CPU = "register_cpu_ci(est_time=5, suite='default')"
CUDA = "register_cuda_ci(est_time=5, suite='default')"
SKIPS = "register_cpu_ci(est_time=5, suite='skips')"
# The call is found in the source; sglang itself need not be imported.
HEADER = """
import atexit, os, time, unittest
def register_cpu_ci(**_): pass
def register_cuda_ci(**_): pass
class Test(unittest.TestCase):
    def test_good(self): pass
"""


@pytest.fixture
def run(tmp_path):
    """Runs the tool over test files, given by name: a registration and more of the text."""

    def run(files: dict[str, tuple], *arguments: str) -> int:
        for name, text in files.items():
            path = tmp_path / "registered" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(HEADER + "\n".join(text))
        folders = ["--root", f"{tmp_path}/registered", "--reports", f"{tmp_path}/out"]
        return run_suite.main([*folders, *arguments])

    return run


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "    def test_bad(self): self.assertEqual(1, 2, 'no')",
            "Test.test_bad: 1 != 2",
        ),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("    def test_z(self): os._exit(0)", "no test was finished"),
        ("atexit.register(os._exit, 3)", "exit status 3 after its tests"),
        ("os.kill(os.getpid(), 11)", "signal 11 (Segmentation fault)"),
        ("    def test_hang(self): time.sleep(600)", "in test_hang"),  # where it hung
    ],
)
def test_what_counts_as_failed(run, capsys, text, message):
    files = {"test_a.py": (text, CPU), "test_b.py": (CPU,)}
    assert run(files, "--timeout-per-file", "3") == 1
    out = capsys.readouterr().out
    assert message in out and "[2/2] test_b.py ... 1 passed" in out
    assert " 1 failed, 0 skipped" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ("", 0, "2 passed, 0 failed, 0 skipped"),
        ("--hw cuda", 0, "1 passed, 0 failed, 0 skipped"),
        ("--suite all", 0, "2 passed, 0 failed, 1 skipped"),
        ("--suite skips", 2, "0 passed, 0 failed, 1 skipped"),
        ("--suite nope", 2, "no file for cpu nope; suites: default, skips"),
        ("ROOT/test_cuda.py", 2, "not registered for this suite: ROOT/test_cuda.py"),
        ("--total ROOT/none.xml", 1, "none.xml: no test ran"),
    ],
)
def test_what_runs(run, tmp_path, capsys, arguments, status, message):
    skipped = ("raise unittest.SkipTest('not here')", SKIPS)
    files = {"test_a.py": (CPU,), "deep/test_a.py": (CPU,), "test_cuda.py": (CUDA,)}
    files |= {"test_skips.py": skipped}
    root = f"{tmp_path}/registered"
    assert run(files, *arguments.replace("ROOT", root).split()) == status
    told = "".join(capsys.readouterr()).replace(root, "ROOT")
    assert message in told


def test_a_file_that_is_not_registered_is_refused(run, capsys):
    assert run({"test_a.py": (CPU,), "test_b.py": ()}) == 2
    assert "No CI registry found in " in capsys.readouterr().err
