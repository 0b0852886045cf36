#!/usr/bin/env python3
"""Breaks our code in the ways of test/mutations.toml, and shows that the tests notice.

Each mutation changes one place in a copy of the installed sglang; its tests then run
against the copy, on the CPU with emulated kernels. First they run against an unchanged
copy. Exit status 1 when a mutation survives or its text is gone, or when the tests fail
unmutated. Nothing that is installed is changed. Needs .venv (./scripts/setup.sh).
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from in_venv import run_in_venv

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    run_in_venv()
sys.path.append(str(ROOT / "test"))
from run_suite import count, read_cases, run_process

TESTS = ROOT / "test" / "registered"
PYTEST = "-m pytest -x -q -p no:cacheprovider".split()
SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_MXFP8_EMULATION": "1",
    "SGLANG_TEST_MAX_RETRY": "0",
    "OMP_NUM_THREADS": "1",
}


def read_mutations() -> dict[str, dict]:
    return tomllib.loads((ROOT / "test" / "mutations.toml").read_text())


def misfit(package: Path, mutation: dict) -> str:
    """Why the mutation cannot be applied, or ""."""
    file = package / mutation["file"]
    if not file.exists():
        return f"there is no {mutation['file']}"
    found = file.read_text().count(mutation["find"])
    return "" if found == 1 else f"its text is {found} times in {file.name}, not once"


def copy_package(package: Path, target: Path, mutation: dict | None) -> None:
    """Copy `package` into `target` by links, but for the file that is mutated."""
    shutil.copytree(package, target / package.name, copy_function=os.symlink)
    if mutation:
        file = target / package.name / mutation["file"]
        text = file.read_text().replace(mutation["find"], mutation["replace"])
        file.unlink()
        file.write_text(text)
        for bytecode in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            bytecode.unlink()


def run_tests(package: Path, mutation: dict | None, tests: list, timeout: float) -> str:
    """ "survived", "killed by" the test that failed, or what else went wrong."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy_package(package, Path(folder), mutation)
        path = os.pathsep.join([folder, str(ROOT / "scripts" / "cpu_stand_ins")])
        report, log = Path(folder, "report.xml"), Path(folder, "log")
        command = [sys.executable, *PYTEST, f"--junitxml={report}", *tests]
        environment = {**os.environ, **SETTINGS, "PYTHONPATH": path}
        status = run_process(command, log, timeout, cwd=TESTS, env=environment)
        cases = read_cases(report)
        failed = [text for outcome, text in cases if outcome == "failed"]
        if status == 1 and failed:
            return f"killed by {failed[0].partition(': ')[0]}"
        if status == 0 and count(cases)["passed"]:
            return "survived"
        return f"pytest ended with {status}: {log.read_text()[-800:]}"


def check(package: Path, mutations: dict[str, dict], jobs: int, timeout: float) -> bool:
    """Print a row of a Markdown table for each mutation; whether all were killed."""
    alone = {f"unmutated {m['tests']}": m["tests"] for m in mutations.values()}

    def is_good(name: str) -> bool:
        mutation = mutations.get(name)
        verdict = misfit(package, mutation) if mutation else ""
        tests = mutation["tests"] if mutation else alone[name]
        verdict = verdict or run_tests(package, mutation, tests, timeout)
        what = [mutation["breaks"], mutation["file"]] if mutation else []
        print(f"| {' | '.join([name, *what, verdict])} |", flush=True)
        return verdict.startswith("killed by" if mutation else "survived")

    with ThreadPoolExecutor(jobs) as pool:
        return all([*pool.map(is_good, alone)]) and all([*pool.map(is_good, mutations)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations (all)")
    parser.add_argument("--fit", action="store_true", help="only look for the texts")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    mutations = read_mutations()
    if unknown := set(args.names) - set(mutations):
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    mutations = {name: mutations[name] for name in args.names or mutations}
    package = Path(importlib.util.find_spec("sglang").origin).parent
    if not args.fit:
        return 0 if check(package, mutations, args.jobs, args.timeout) else 1
    misfits = {name: misfit(package, mutation) for name, mutation in mutations.items()}
    gone = [f"{name}: {why}" for name, why in misfits.items() if why]
    print("\n".join([*gone, f"{len(gone)} of {len(mutations)} do not fit"]))
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
