#!/usr/bin/env python3
"""Runs registered test files by pytest, each in a process of its own.

A file under test/registered says where it belongs by a call of sglang's
register_cpu_ci(est_time=.., suite=..) or register_cuda_ci. It runs under a time limit; the
reports directory gets its JUnit report, PATH.xml, and its output, PATH.log. An import error,
a crash, a hang and a file without tests are failures. Needs .venv (./scripts/setup.sh).

exit status:
  0    no test failed and at least one ran (a skipped one did not)
  1    a test or a file failed
  2    nothing to run, nothing that ran (all skipped), a file that is not registered, or
       wrong arguments
  130  a signal interrupted the run
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

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))
from in_venv import run_in_venv

if __name__ == "__main__":
    run_in_venv()
from sglang.test.ci.ci_register import collect_tests

GRACE_S = 10  # for a hanging process to write where it hangs


def select(files: list[Path], hw: str) -> list[Path]:
    """The files that are registered for `hw` and enabled. Raises ValueError for one that is
    not registered at all, and where nothing is left."""
    found = collect_tests([str(file.resolve()) for file in files])
    fitting = [each for each in found if each.backend.name == hw.upper()]
    for each in fitting:
        if each.disabled:
            print(f"disabled: {each.filename}: {each.disabled}")
    names = dict.fromkeys(each.filename for each in fitting if not each.disabled)
    if not names:
        raise ValueError(f"no file for {hw}")
    return [*map(Path, names)]


def count(report: Path) -> Counter:
    """The outcomes in a JUnit report; none where it is not there or not whole."""
    counts = Counter()
    with contextlib.suppress(OSError, ET.ParseError):
        for case in ET.parse(report).iter("testcase"):
            tags = {child.tag for child in case}
            failed = tags & {"failure", "error"}
            outcome = (
                "failed" if failed else "skipped" if "skipped" in tags else "passed"
            )
            counts[outcome] += 1
    return counts


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


def run_file(file: Path, report: Path, timeout: float) -> Counter:
    """Run one file, print what became of it, and leave its report and its log."""
    log = report.with_suffix(".log")
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(file), f"--junitxml={report}"]
    status = run_process(command, log, timeout)
    counts, told = count(report), ""
    # pytest ends with 5 where the whole file is skipped.
    if not counts or status not in ([1] if counts["failed"] else [0, 5]):
        told = "timed out" if status is None else f"ended with {status}"
        told += f" after {summary(counts)}: "
        report.write_text(f"<testcase name='{file.name}'><error/></testcase>")
        counts = count(report)
    print(f"{told}{summary(counts)}", flush=True)
    if counts["failed"]:
        tail = log.read_text(errors="replace").splitlines()[-50:]
        print(f"----- the end of {log}", *tail, "-----", sep="\n", flush=True)
    return counts


def run_suite(args: argparse.Namespace) -> int:
    files = select(args.files or sorted(args.root.rglob("test_*.py")), args.hw)
    counts = Counter()
    for position, file in enumerate(files, 1):
        name = file.relative_to(args.root)
        print(f"[{position}/{len(files)}] {name} ... ", end="", flush=True)
        report = (args.reports / name).with_suffix(".xml")
        counts += run_file(file, report, args.timeout_per_file)
    print(summary(counts), flush=True)
    return 1 if counts["failed"] else 0 if counts["passed"] else 2


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="run these files only")
    add("--hw", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--total", type=Path, metavar="REPORTS", help="add up JUnit reports, run none")
    add("--timeout-per-file", type=float, default=900, metavar="SECONDS")
    add("--reports", type=Path, default=REPOSITORY / ".cache/reports", metavar="DIR")
    add("--root", type=Path, default=REPOSITORY / "test/registered", metavar="DIR")
    args = parser.parse_args(argv)
    args.reports, args.root = args.reports.resolve(), args.root.resolve()
    if args.total:
        print(summary(sum(map(count, args.total.rglob("*.xml")), Counter())))
        return 0
    try:
        return run_suite(args)
    except (OSError, SyntaxError, ValueError) as error:
        print(f"run_suite.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    os.environ["SGLANG_TEST_MAX_RETRY"] = "0"  # a test that fails once has failed
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a hang is ended by SIGABRT
    for number in signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)  # what runs ends, too
    sys.exit(main())
