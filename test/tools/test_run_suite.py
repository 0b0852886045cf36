"""test/run_suite.py: nothing that failed, hung or did not run passes for a success."""

import pytest
import run_suite

CPU = "register_cpu_ci(est_time=5, suite='default')"
# The call is found in the source; sglang itself need not be imported.
HEADER = """
import atexit, os, time, unittest
def register_cpu_ci(**_): pass
def register_cuda_ci(**_): pass
class Test(unittest.TestCase):
    def test_good(self): pass
"""


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the tool over test files, given by name and a part of the text; its exit status,
    and what it says."""

    def run(files: dict[str, str], *arguments: str) -> tuple[int, str]:
        for name, text in files.items():
            path = tmp_path / "registered" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{HEADER}{text}\n")
        folders = ["--root", f"{tmp_path}/registered", "--reports", f"{tmp_path}/out"]
        status = run_suite.main([*folders, *arguments])
        return status, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "text, message",
    [
        ("    def test_bad(self): self.assertEqual(1, 2, 'no')", "1 != 2"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("    def test_z(self): os._exit(0)", "ended with 0 after 0 passed, "),
        ("atexit.register(os._exit, 3)", "ended with 3 after 1 passed, "),
        ("os.kill(os.getpid(), 11)", "ended with -11 after 0 passed"),
        ("    def test_hang(self): time.sleep(600)", "in test_hang"),  # where it hung
        ("del Test", "ended with 5 after 0 passed"),
    ],
)
def test_what_counts_as_failed(run, tmp_path, text, message):
    files = {"test_a.py": f"{text}\n{CPU}", "deep/test_b.py": CPU}
    status, told = run(files, "--timeout-per-file", "3")
    assert status == 1 and message in told
    assert "] deep/test_b.py ... 1 passed, 0 failed, 0 skipped\n" in told
    last = told.splitlines()[-1]
    assert " 1 failed, 0 skipped" in last
    assert run({}, "--total", f"{tmp_path}/out") == (0, f"{last}\n")


def test_what_runs(run, tmp_path):
    skips = f"raise unittest.SkipTest('not here')\n{CPU}"
    cuda = CPU.replace("cpu", "cuda")
    files = {"test_a.py": CPU, "test_cuda.py": cuda, "test_skips.py": skips}
    first, second, third = (f"{tmp_path}/registered/{name}" for name in files)
    for arguments, status, message in (
        ([], 0, "1 passed, 0 failed, 1 skipped"),
        (["--hw", "cuda"], 0, "1 passed, 0 failed, 0 skipped"),
        ([third], 2, "0 passed, 0 failed, 1 skipped"),
        ([second], 2, "no file for cpu"),
    ):
        told = run(files, *arguments)
        assert told[0] == status and message in told[1]
    told = run({"test_new.py": ""})
    assert told[0] == 2 and "No CI registry found in " in told[1]
    assert run({}, first)[0] == 0  # whatever stands beside it
