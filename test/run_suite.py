#!/usr/bin/env python3
"""Runs the test files that are registered for a suite, as sglang's CI does.

    run_suite.py [--hw cpu|cuda] [--suite NAME] [options] [FILE ...]
    run_suite.py --registered-files
    run_suite.py --total FILE ...

A file under test/registered says where it belongs by a call of sglang's
register_cpu_ci(est_time=.., suite=..) or register_cuda_ci. Each file runs in a process
of its own, under a time limit. Under the reports directory, PATH.xml (JUnit) and PATH.log
are written per file, and summary.json.

An import error, a crash, a hang, a file without tests and a failed subTest are failures.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import unittest
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Iterable, Iterator, NoReturn, Optional

REPOSITORY = Path(__file__).resolve().parent.parent
GRACE_S = 10  # between SIGTERM and SIGKILL
POLL_S = 0.05
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}
TAIL_LINES = 50
TAIL_BYTES = 64 * 1024

EXIT_STATUSES = """\
exit status:
  0    no test failed and at least one ran (a skipped test did not run); or --list found
       files; or the shard of this --auto-partition-id holds no file of a suite that has
       some, which is said: a CI matrix may have more jobs than the suite has files
  1    a test or a file failed; with --total, also a part that is missing or incomplete
  2    nothing to run (no such suite, no such file, all disabled), nothing that ran (all
       skipped), or wrong arguments
  128+ the number of the signal that interrupted the run, which ends by that signal
"""


class UsageError(Exception):
    """Nothing can be run; the message says why."""


class Interrupted(KeyboardInterrupt):
    """The runner was told to stop by a signal: args[0]."""


@dataclass(frozen=True)
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.passed + other.passed,
            self.failed + other.failed,
            self.skipped + other.skipped,
        )

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass(frozen=True)
class Case:
    """A test of a JUnit report; outcome is "passed", "failed" or "skipped"."""

    name: str
    outcome: str
    message: str = ""


@dataclass(frozen=True)
class TestFile:
    """A file that is registered for the suite; `name` is relative to the root."""

    name: str
    est_time: float
    disabled: Optional[str] = None

    __test__ = False  # for pytest


@dataclass(frozen=True)
class Attempt:
    """One run of a file. `problem` is what went wrong outside its tests, and `interrupt`
    the signal that ended the runner meanwhile."""

    cases: list[Case]
    seconds: float
    problem: Optional[str] = None
    interrupt: Optional[int] = None

    @property
    def counts(self) -> Counts:
        return count(self.cases)


@dataclass
class Run:
    """What became of the files; `attempts` of those that were started."""

    not_run: list[str]
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)

    @property
    def interrupt(self) -> Optional[int]:
        """The number of the signal that ended the run early."""
        last = [attempts[-1].interrupt for attempts in self.attempts.values()]
        return last[-1] if last else None

    @property
    def counts(self) -> Counts:
        last = (attempts[-1].counts for attempts in self.attempts.values())
        return sum(last, Counts())


# --- Which files -----------------------------------------------------------------------


def read_registrations(root: Path) -> tuple[list, list[str]]:
    """Return sglang's CIRegistry objects of all files below `root`, with file names
    relative to it, and the test files that have none."""
    from sglang.test.ci.ci_register import collect_tests

    files = sorted(str(path) for path in root.rglob("*.py"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning for each file without registration
        try:
            found = collect_tests(files, sanity_check=False)
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"cannot read registrations: {error}") from error
    for registry in found:
        registry.filename = relative(registry.filename, root)
    registered = {registry.filename for registry in found}
    tests = [relative(f, root) for f in files if Path(f).name.startswith("test_")]
    return found, [name for name in tests if name not in registered]


def relative(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


def select(registries: Iterable, hw: str, suite: str, nightly: bool) -> list[TestFile]:
    """Return the files of the suite ("all": of every suite), sorted, each one once."""
    files = {}
    for registry in registries:
        if registry.backend.name != hw.upper() or registry.nightly != nightly:
            continue
        if suite in ("all", registry.suite):
            file = TestFile(registry.filename, registry.est_time, registry.disabled)
            known = files.setdefault(file.name, file)
            if known.disabled is not None:
                files[file.name] = file
    return [files[name] for name in sorted(files)]


def suite_names(registries: Iterable, hw: str, nightly: bool) -> list[str]:
    found = (r for r in registries if r.backend.name == hw.upper())
    return sorted({r.suite for r in found if r.nightly == nightly})


def partition(files: list[TestFile], index: int, size: int) -> list[TestFile]:
    """Return shard `index` of `size`: the longest file first, each to the shard that has
    the least to do. Every file is in exactly one shard, whatever the order of `files`.
    """
    loads = [0.0] * size
    shard = []
    for file in sorted(files, key=lambda file: (-file.est_time, file.name)):
        target = min(range(size), key=lambda i: (loads[i], i))
        loads[target] += file.est_time
        if target == index:
            shard.append(file)
    return sorted(shard, key=lambda file: file.name)


def pick(files: list[TestFile], names: list[str], root: Path) -> list[TestFile]:
    """Return those of `files` that are named, by a path or relative to `root`."""
    if not names:
        return files
    wanted = {}
    for name in names:
        path = Path(name) if Path(name).exists() else root / name
        wanted[path.resolve()] = name
    picked = [file for file in files if (root / file.name).resolve() in wanted]
    for file in picked:
        del wanted[(root / file.name).resolve()]
    if wanted:
        missing = ", ".join(wanted.values())
        raise UsageError(f"not registered for this suite under {root}: {missing}")
    return picked


# --- Reports ---------------------------------------------------------------------------


def count(cases: Iterable[Case]) -> Counts:
    return Counts(**Counter(case.outcome for case in cases))


def read_case(element: ET.Element) -> Case:
    name = f"{element.get('classname', '')}.{element.get('name', '')}".strip(".")
    for tag, outcome in OUTCOMES.items():
        found = element.find(tag)
        if found is not None:
            return Case(name, outcome, found.get("message") or "")
    return Case(name, "passed")


def read_cases(report: ET.Element) -> list[Case]:
    return [read_case(element) for element in report.iter("testcase")]


def read_report(path: Path) -> Optional[ET.Element]:
    """Return the root of a JUnit report, or None where there is no readable one."""
    try:
        return ET.parse(path).getroot()
    except (OSError, ET.ParseError):
        return None


def add_problem(report: ET.Element, file: str, problem: str, details: str) -> None:
    """Add a test case that stands for the file itself."""
    from xmlrunner.result import safe_unicode

    suite = ET.SubElement(report, "testsuite", name=file, file=file)
    case = ET.SubElement(suite, "testcase", classname=file, name="(the whole file)")
    error = ET.SubElement(case, "error", type="FileFailed", message=problem)
    error.text = safe_unicode(details)
    for key, value in {"tests": "1", "errors": "1"}.items():
        suite.set(key, value)


def write_report(report: ET.Element, path: Path, file: str, attempt: int) -> None:
    """Write one JUnit file, with the totals at its root."""
    counts = count(read_cases(report))
    errors = len(list(report.iter("error")))
    attributes = {
        "tests": counts.passed + counts.failed + counts.skipped,
        "failures": counts.failed - errors,
        "errors": errors,
        "skipped": counts.skipped,
        "attempts": attempt,
    }
    report.set("name", file)
    for name, value in attributes.items():
        report.set(name, str(value))
    partial = partial_path(path)
    ET.ElementTree(report).write(partial, encoding="utf-8", xml_declaration=True)
    partial.replace(path)


def tail(path: Path) -> str:
    """Return the last lines of a log."""
    with open(path, "rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])


# --- One file in one process -----------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit status (minus the signal's number where one ended
    it), why we stopped it if we did, and the signal that we got."""

    status: int
    stopped: Optional[str] = None
    interrupt: Optional[int] = None


def run_process(command: list[str], log: IO, timeout: float) -> Ending:
    """Run a command as the leader of a process group, and end what is left of the group."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "SGLANG_TEST_MAX_RETRY": "0"},
        process_group=0,
    )
    stopped = interrupt = None
    try:
        if not has_exited(process.pid, timeout):
            stopped = f"timed out after {timeout:g} s"
    except Interrupted as interruption:
        interrupt = interruption.args[0]
        stopped = f"interrupted by {signal.Signals(interrupt).name}"
    finally:
        end_group(process)
    return Ending(process.returncode, stopped, interrupt)


def has_exited(pid: int, timeout: float) -> bool:
    """Wait for the end of a child of ours, without reaping it."""
    deadline = time.monotonic() + timeout
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, pid, options) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def end_group(leader: subprocess.Popen) -> None:
    """End the processes of the group: SIGTERM, then SIGKILL after GRACE_S.

    The leader is reaped last: until then no other process can get its number, so that
    no group but the one that we started can be hit.
    """
    try:
        if group_lives(leader.pid):
            os.killpg(leader.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while group_lives(leader.pid) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


def group_lives(group: int) -> bool:
    """Whether any process of the group has not ended yet."""
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(pid) == group:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    return True
    return False


def describe_problem(ending: Ending, cases: Optional[list[Case]]) -> Optional[str]:
    """Say what went wrong beside the failed tests of the report, if anything did.

    `cases` is None where the process left no report.
    """
    if ending.stopped:
        return ending.stopped
    end = f"exit status {ending.status}"
    if ending.status < 0:
        end = f"ended by signal {-ending.status} ({signal.strsignal(-ending.status)})"
    if cases is None:
        return f"{end} before its tests were finished"
    if ending.status not in (0, 1):
        return f"{end} after its tests"
    if not cases:
        return "no tests in it"
    if ending.status and not count(cases).failed:
        return f"{end}, though no test failed"
    return None


def attempt_file(
    root: Path, name: str, number: int, options: argparse.Namespace
) -> Attempt:
    """Run a file once, and see to it that there is a report of that."""
    report_path, log_path = report_paths(options.reports, name)
    child_report = report_path.with_suffix(".child")
    remove_child_reports(child_report)  # of a runner that was killed
    command = child_command(root, name, child_report)
    started = time.monotonic()
    with open(log_path, "a") as log:
        print(f"===== attempt {number} of {name}", file=log, flush=True)
        ending = run_process(command, log, options.timeout_per_file)
    seconds = time.monotonic() - started
    report = read_report(child_report)
    problem = describe_problem(ending, None if report is None else read_cases(report))
    if report is None:
        report = ET.Element("testsuites")
    if problem is not None:
        add_problem(report, name, problem, tail(log_path))
    write_report(report, report_path, name, number)
    remove_child_reports(child_report)
    return Attempt(read_cases(report), seconds, problem, ending.interrupt)


def remove_child_reports(path: Path) -> None:
    for report in path, partial_path(path):
        report.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def report_paths(reports: Path, name: str) -> tuple[Path, Path]:
    path = reports / name
    return path.with_suffix(".xml"), path.with_suffix(".log")


def child_command(root: Path, name: str, report: Path) -> list[str]:
    flags = ["-u", "-X", "faulthandler"]
    child = [str(Path(__file__).resolve()), "--child", str(root), name, str(report)]
    return [sys.executable, *flags, *child]


def run_child(root: str, name: str, report: str) -> int:
    """Run the tests of a file in this process and write their report.

    The module is named after the path, so that its classes can be pickled and files of
    the same name keep apart in the reports; it is not `__main__`.
    """
    import faulthandler

    import xmlrunner

    # A shell ignores SIGINT in what it starts in the background, and so would we.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(signal.SIGTERM, chain=True)
    path = Path(root, name)
    sys.argv = [str(path)]
    sys.path[0] = str(path.parent)
    sys.path.append(root)
    suite = load_tests_of(path, ".".join(Path(name).with_suffix("").parts))
    partial = partial_path(Path(report))
    with open(partial, "wb") as output:
        runner = xmlrunner.XMLTestRunner(
            output, outsuffix="", verbosity=2, resultclass=result_class()
        )
        result = runner.run(suite)
    partial.replace(report)
    return 0 if result.wasSuccessful() else 1


def load_tests_of(path: Path, name: str) -> unittest.TestSuite:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except unittest.SkipTest as skip:
        return skipped_module(name, str(skip))
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def skipped_module(name: str, reason: str) -> unittest.TestSuite:
    """Stand for a module that skips itself, as in unittest's own loader."""
    body = {"test_module": lambda self: None, "__module__": name}
    case = unittest.skip(reason)(type("Module", (unittest.TestCase,), body))
    return unittest.TestSuite([case("test_module")])


def result_class() -> type:
    """Return xmlrunner's result class, but with sys.stdout left alone.

    Its replacement has no file descriptor, which programs that tests start may need.
    The output is in the log.
    """
    from xmlrunner.result import _XMLTestResult

    class Result(_XMLTestResult):
        def _setupStdout(self):
            pass

        def _restoreStdout(self):
            pass

    return Result


# --- All files -------------------------------------------------------------------------


def run_files(root: Path, files: list[TestFile], options: argparse.Namespace) -> Run:
    """Run the files one after the other, and say so as it goes."""
    run = Run([file.name for file in files])
    remove_reports(run.not_run, options.reports)
    for position, file in enumerate(files, 1):
        run_with_retries(root, file.name, f"[{position}/{len(files)}]", options, run)
        if run.interrupt is not None:
            break
    return run


def remove_reports(names: list[str], reports: Path) -> None:
    """Remove what an earlier run left, and make the directories."""
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "summary.json").unlink(missing_ok=True)
    for name in names:
        for path in report_paths(reports, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)


def run_with_retries(
    root: Path, name: str, label: str, options: argparse.Namespace, run: Run
) -> None:
    """Run a file until it passes, `options.retry` times more at most."""
    run.not_run.remove(name)
    attempts = run.attempts[name] = []
    for number in range(1, options.retry + 2):
        again = f" (attempt {number} of {options.retry + 1})" if number > 1 else ""
        print(f"{label} {name}{again} ... ", end="", flush=True)
        attempts.append(attempt_file(root, name, number, options))
        print(describe(attempts[-1]), flush=True)
        if not attempts[-1].counts.failed:
            return
        print_tail(report_paths(options.reports, name)[1])
        if attempts[-1].interrupt is not None:
            return
        if number <= options.retry:
            print(f"{label} {name} failed and is retried", flush=True)


def describe(attempt: Attempt) -> str:
    """Return "passed 12, skipped 1 (8.2 s)"."""
    counts = asdict(attempt.counts).items()
    parts = [f"{word} {number}" for word, number in counts if number]
    text = f"{', '.join(parts)} ({attempt.seconds:.1f} s)"
    if attempt.counts.failed:
        text = f"FAILED: {text}"
    return f"{text}: {attempt.problem}" if attempt.problem else text


def print_tail(log: Path) -> None:
    print(f"----- the end of {log}")
    print(tail(log))
    print("-----", flush=True)


def end_lines(run: Run, disabled: list[TestFile]) -> Iterator[str]:
    """Yield what is to be said at the end."""
    for file in disabled:
        yield f"disabled: {file.name}: {file.disabled}"
    for name, attempts in run.attempts.items():
        skips = Counter(c.message for c in attempts[-1].cases if c.outcome == "skipped")
        for reason, number in skips.items():
            yield f"skipped {number}: {name}: {reason}"
    for name, attempts in run.attempts.items():
        if len(attempts) > 1:
            failed = bool(attempts[-1].counts.failed)
            outcome = "failed every time" if failed else "passed at last"
            yield f"retried: {name}: {len(attempts)} attempts, {outcome}"
    for name, attempts in run.attempts.items():
        for case in attempts[-1].cases:
            if case.outcome == "failed":
                yield f"failed: {name}: {case.name}: {first_line(case.message)}"
    for name in run.not_run:
        yield f"not run: {name}"


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def summarize(
    run: Run, disabled: list[TestFile], unregistered, options: argparse.Namespace
) -> dict:
    """Return the content of summary.json."""
    return {
        **asdict(run.counts),
        "interrupt": run.interrupt,
        "hw": options.hw,
        "suite": options.suite,
        "partition": [options.auto_partition_id, options.auto_partition_size],
        "files": [
            {"file": name, **asdict(attempts[-1].counts), "attempts": attempts}
            for name, attempts in run.attempts.items()
        ],
        "not_run": run.not_run,
        "disabled": {file.name: file.disabled for file in disabled},
        "unregistered": unregistered,
    }


def write_summary(summary: dict, reports: Path) -> None:
    text = json.dumps(summary, indent=2, default=asdict)
    (reports / "summary.json").write_text(text + "\n")


def exit_status(run: Run) -> int:
    if run.interrupt is not None:
        return 128 + run.interrupt
    if run.counts.failed:
        return 1
    return 0 if run.counts.passed else 2


# --- The total -------------------------------------------------------------------------


def read_part(path: Path) -> tuple[Counts, Optional[str]]:
    """Read a summary.json or a JUnit report; return also what is wrong with it."""
    if path.suffix == ".json":
        return read_summary(path)
    report = read_report(path)
    if report is None:
        return Counts(), "no report"
    counts = count(read_cases(report))
    return counts, None if counts.passed + counts.failed else "no test ran"


def read_summary(path: Path) -> tuple[Counts, Optional[str]]:
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError):
        return Counts(), "no summary"
    counts = Counts(summary["passed"], summary["failed"], summary["skipped"])
    if summary["interrupt"] or summary["not_run"]:
        return counts, "interrupted"
    return counts, None if counts.passed + counts.failed else "no test ran"


def print_total(paths: list[str]) -> int:
    """Print the sum of the parts; a part that did not run to its end is a failure."""
    total = Counts()
    problems = []
    for path in paths:
        counts, problem = read_part(Path(path))
        total += counts
        if problem:
            problems.append(f"{path}: {problem}")
    for problem in problems:
        print(f"run_suite.py: {problem}", file=sys.stderr, flush=True)
    print(total)
    return 1 if total.failed or problems else 0


# --- The command -----------------------------------------------------------------------


def parse_arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="run these files of the suite only")
    add("--hw", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--suite", default="default", help='default: "default"; "all" is every suite')
    add(
        "--nightly", action="store_true", help="the nightly tests instead of the others"
    )
    add("--auto-partition-id", type=int, metavar="I", help="run shard I, from 0,")
    add(
        "--auto-partition-size",
        type=int,
        metavar="N",
        help="of N, balanced by est_time",
    )
    add("--list", action="store_true", help="print what would run, and run nothing")
    add("--registered-files", action="store_true", help="print every registered file")
    add(
        "--total", nargs="+", metavar="FILE", help="add up summary.json and JUnit files"
    )
    add("--timeout-per-file", type=float, default=900, metavar="SECONDS")
    add("--retry", type=int, default=0, metavar="N", help="run a failed file again")
    add(
        "--reports", type=Path, default=REPOSITORY / ".cache" / "reports", metavar="DIR"
    )
    add("--root", type=Path, default=REPOSITORY / "test" / "registered", metavar="DIR")
    options = parser.parse_args(argv)
    options.reports = options.reports.resolve()
    check_arguments(parser, options)
    return options


def check_arguments(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    index, size = options.auto_partition_id, options.auto_partition_size
    if (index is None) != (size is None):
        parser.error("--auto-partition-id and --auto-partition-size go together")
    if size is not None and not 0 <= index < size:
        parser.error(f"--auto-partition-id {index} is not in 0..{size - 1}")
    if options.retry < 0:
        parser.error(f"--retry {options.retry} is negative")
    if not options.timeout_per_file > 0:
        parser.error(f"--timeout-per-file {options.timeout_per_file:g} is not positive")


def run_suite(options: argparse.Namespace) -> int:
    """Select files, and run them or list them."""
    root = options.root.resolve()
    registries, unregistered = read_registrations(root)
    if options.registered_files:
        for name in sorted({registry.filename for registry in registries}):
            print(root / name)
        return 0
    selected = pick(select_suite(root, registries, options), options.files, root)
    disabled = [file for file in selected if file.disabled is not None]
    enabled = [file for file in selected if file.disabled is None]
    files = shard_of(enabled, options)
    if options.list:
        return print_list(files, disabled, unregistered)
    if not enabled:
        reasons = "; ".join(f"{file.name}: {file.disabled}" for file in disabled)
        raise UsageError(f"every file is disabled: {reasons}")
    run = run_files(root, files, options)
    write_summary(summarize(run, disabled, unregistered, options), options.reports)
    for line in end_lines(run, disabled):
        print(line)
    if not files:
        print(f"This shard is empty: the {len(enabled)} files are in other shards")
    elif not run.counts.passed + run.counts.failed:
        print("No test ran")
    print(run.counts, flush=True)
    return exit_status(run) if files else 0


def select_suite(
    root: Path, registries: list, options: argparse.Namespace
) -> list[TestFile]:
    selected = select(registries, options.hw, options.suite, options.nightly)
    if not selected:
        names = suite_names(registries, options.hw, options.nightly)
        raise UsageError(
            f"no file under {root} is registered for --hw {options.hw} --suite "
            f"{options.suite}; suites: {', '.join(names) or 'none'}"
        )
    return selected


def shard_of(files: list[TestFile], options: argparse.Namespace) -> list[TestFile]:
    if options.auto_partition_size is None:
        return files
    return partition(files, options.auto_partition_id, options.auto_partition_size)


def print_list(files: list[TestFile], disabled: list[TestFile], unregistered) -> int:
    for file in files:
        print(f"{file.name} ({file.est_time:g} s)")
    for file in disabled:
        print(f"disabled: {file.name}: {file.disabled}")
    for name in unregistered:
        print(f"not registered: {name}")
    total = sum(file.est_time for file in files)
    print(f"{len(files)} files, about {total:g} s")
    return 0


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise Interrupted for the signals that ask us to stop, unless they are ignored."""

    def interrupt(number, frame):
        raise Interrupted(number)

    previous = {}
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_by_signal_or_status(status: int) -> NoReturn:
    """End as the signal would have ended us, so that a calling script stops as well."""
    if status > 128:
        sys.stdout.flush()
        signal.signal(status - 128, signal.SIG_DFL)
        os.kill(os.getpid(), status - 128)
    sys.exit(status)


def main(argv: Optional[list[str]] = None) -> int:
    options = parse_arguments(argv)
    if options.total:
        return print_total(options.total)
    try:
        with signals_as_exceptions():
            return run_suite(options)
    except UsageError as error:
        print(f"run_suite.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupt:
        return 128 + interrupt.args[0]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(run_child(*sys.argv[2:]))
    exit_by_signal_or_status(main())
