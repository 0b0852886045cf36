#!/usr/bin/env python3
"""Runs the test files that are registered for a suite, each in a process of its own.

A file under test/registered says where it belongs by a call of sglang's
register_cpu_ci(est_time=.., suite=..) or register_cuda_ci. `python -m xmlrunner` runs it
under a time limit; the reports directory gets its JUnit report, PATH.xml, and its output,
PATH.log. An import error, a crash, a hang and a file without tests are failures. Needs
.venv (./scripts/setup.sh).

exit status:
  0    no test failed and at least one ran (a skipped one did not)
  1    a test or a file failed; with --total, also a part in which no test ran
  2    nothing to run (no such suite, no such file, all disabled), nothing that ran (all
       skipped), a file that is not registered, or wrong arguments
  128+ the number of the signal that interrupted the run, which ends by that signal
"""

import argparse
import contextlib
import os
import resource
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import quoteattr

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))
from in_venv import run_in_venv

if __name__ == "__main__":
    run_in_venv()
from sglang.test.ci.ci_register import CIRegistry, collect_tests

GRACE_S = 10  # for a hanging process to write where it hangs
XMLRUNNER = "-u -X faulthandler -m xmlrunner discover -v".split()
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def select(found: list[CIRegistry], args: argparse.Namespace) -> list[CIRegistry]:
    """The registrations that the arguments ask for, one a file. Raises ValueError."""
    fitting = [r for r in found if r.backend.name == args.hw.upper()]
    files = {r.filename: r for r in fitting if args.suite in ("all", r.suite)}
    if not files:
        suites = ", ".join(sorted({r.suite for r in fitting})) or "none"
        raise ValueError(f"no file for {args.hw} {args.suite}; suites: {suites}")
    wanted = [str(Path(name).resolve()) for name in args.files] or list(files)
    if unknown := [name for name in wanted if name not in files]:
        raise ValueError(f"not registered for this suite: {', '.join(unknown)}")
    return [files[name] for name in wanted]


def read_cases(report: Path) -> list[tuple[str, str]]:
    """(outcome, name and message) of each test of a JUnit report; none without one."""
    try:
        elements = ET.parse(report).iter("testcase")
    except (OSError, ET.ParseError):
        return []
    cases = []
    for case in elements:
        found = [child for child in case if child.tag in OUTCOMES]
        outcome = OUTCOMES[found[0].tag] if found else "passed"
        lines = [child.get("message", "").strip() for child in found] or [""]
        name = f"{case.get('classname')}.{case.get('name')}"
        cases.append((outcome, f"{name}: {lines[0]}".partition("\n")[0]))
    return cases


def count(cases) -> Counter:
    return Counter(outcome for outcome, _ in cases)


def summary(counts: Counter) -> str:
    words = "passed", "failed", "skipped"
    return ", ".join(f"{counts[word]} {word}" for word in words)


def run_process(command: list[str], log: Path, timeout: float, **options) -> int | None:
    """Run a command and end what it started; its exit status, None where it hung."""
    with log.open("w") as output, open(os.devnull) as nothing:
        options |= dict(stdin=nothing, stdout=output, stderr=output)
        process = subprocess.Popen(command, process_group=0, **options)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler writes where it hangs
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find_problem(status: int | None, cases: list) -> str:
    """What went wrong beside failed tests, or ""."""
    if status is None:
        return "timed out"
    end = f"exit status {status}"
    if status < 0:
        end = f"ended by signal {-status} ({signal.strsignal(-status)})"
    if not cases:
        return f"{end}, and no test was finished"
    expected = 1 if count(cases)["failed"] else 0
    return "" if status == expected else f"{end} after its tests"


def run_file(file: str, args: argparse.Namespace) -> Counter:
    """Run one file, print what became of it, and leave its report and its log."""
    report = (args.reports / Path(file).relative_to(args.root)).with_suffix(".xml")
    log = report.with_suffix(".log")
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    folder, name = os.path.split(file)
    command = [sys.executable, *XMLRUNNER, "-s", folder, "-p", name]
    command += ["--output-file", str(report)]
    status = run_process(command, log, args.timeout_per_file)
    if problem := find_problem(status, read_cases(report)):
        case = f"<testcase classname={quoteattr(name)} name='the whole file'>"
        report.write_text(f"{case}<error message={quoteattr(problem)}/></testcase>")
    cases = read_cases(report)
    print(summary(count(cases)), flush=True)
    for outcome, text in cases:
        if outcome != "passed":
            print(f"    {outcome}: {text}")
    if count(cases)["failed"]:
        tail = log.read_text(errors="replace").splitlines()[-50:]
        print(f"----- the end of {log}", *tail, "-----", sep="\n", flush=True)
    return count(cases)


def run_suite(args: argparse.Namespace) -> int:
    tests = sorted(map(str, args.root.rglob("test_*.py")))
    # Of a whole folder, each file must be registered.
    files = select(collect_tests(tests, sanity_check=not args.files), args)
    for file in filter(lambda file: file.disabled, files):
        print(f"disabled: {file.filename}: {file.disabled}")
    enabled = [file for file in files if not file.disabled]
    counts = Counter()
    for position, file in enumerate(enabled, 1):
        name = Path(file.filename).relative_to(args.root)
        print(f"[{position}/{len(enabled)}] {name} ... ", end="", flush=True)
        counts += run_file(file.filename, args)
    print(summary(counts), flush=True)
    return 1 if counts["failed"] else 0 if counts["passed"] else 2


def print_total(parts: list[Path]) -> int:
    """Print the sum of JUnit reports and of folders of them."""
    total, status = Counter(), 0
    for part in parts:
        reports = part, *part.rglob("*.xml")
        counts = count(case for report in reports for case in read_cases(report))
        total += counts
        if not counts["passed"] + counts["failed"]:
            print(f"run_suite.py: {part}: no test ran", file=sys.stderr, flush=True)
            status = 1
    print(summary(total))
    return 1 if total["failed"] else status


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="run these files of the suite only")
    add("--hw", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--suite", default="default", help='default: "default"; "all" is every suite')
    add("--total", nargs="+", type=Path, metavar="REPORTS", help="add up JUnit reports")
    add("--timeout-per-file", type=float, default=900, metavar="SECONDS")
    add("--reports", type=Path, default=REPOSITORY / ".cache/reports", metavar="DIR")
    add("--root", type=Path, default=REPOSITORY / "test/registered", metavar="DIR")
    args = parser.parse_args(argv)
    args.reports, args.root = args.reports.resolve(), args.root.resolve()
    try:
        return print_total(args.total) if args.total else run_suite(args)
    except (SyntaxError, ValueError) as error:  # of a registration, or nothing to run
        print(f"run_suite.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    os.environ["SGLANG_TEST_MAX_RETRY"] = "0"  # a test that fails once has failed
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a hang is ended by SIGABRT
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except SystemExit as end:
        if end.code <= 128:
            raise
        signal.signal(end.code - 128, signal.SIG_DFL)  # so that a script stops as well
        os.kill(os.getpid(), end.code - 128)
