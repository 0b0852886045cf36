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
import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from in_venv import run_in_venv

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    run_in_venv()
sys.path.append(str(ROOT / "test"))
from run_suite import run_process

TIMEOUT_S = 600  # of one run
TESTS = ROOT / "test" / "registered"
PYTEST = "-m pytest -x -rf -p no:cacheprovider".split()
SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_MXFP8_EMULATION": "1",
    "SGLANG_TEST_MAX_RETRY": "0",
    "OMP_NUM_THREADS": "1",
}


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


def run_tests(package: Path, mutation: dict | None, tests: list) -> str:
    """ "survived", "killed by" the test that failed, or what else went wrong."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy_package(package, Path(folder), mutation)
        path = os.pathsep.join([folder, str(ROOT / "scripts" / "cpu_stand_ins")])
        environment = {**os.environ, **SETTINGS, "PYTHONPATH": path}
        command, log = [sys.executable, *PYTEST, *tests], Path(folder, "log")
        status = run_process(command, log, TIMEOUT_S, cwd=TESTS, env=environment)
        told = log.read_text()
    failed = re.search(r"(?m)^(?:SUB)?FAILED.* \S*::(\S+)", told)
    if status == 1 and failed:
        return f"killed by {failed[1]}"
    if status == 0 and re.search(r"\d passed", told):
        return "survived"
    return f"pytest ended with {status}: {told[-800:]}"


def check(package: Path, mutations: dict[str, dict]) -> bool:
    """Print a row of a Markdown table for each mutation; whether all were killed."""
    tested = {
        str(mutation["tests"]): mutation["tests"] for mutation in mutations.values()
    }
    verdicts = [run_tests(package, None, tests) for tests in tested.values()]
    for tests, verdict in zip(tested, verdicts):
        print(f"| unmutated {tests} | {verdict} |", flush=True)
    if set(verdicts) != {"survived"}:
        return False
    are_killed = []
    for name, mutation in mutations.items():
        verdict = misfit(package, mutation)
        verdict = verdict or run_tests(package, mutation, mutation["tests"])
        cells = name, mutation["breaks"], mutation["file"], verdict
        print(f"| {' | '.join(cells)} |", flush=True)
        are_killed.append(verdict.startswith("killed by"))
    return all(are_killed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations (all)")
    parser.add_argument("--fit", action="store_true", help="only look for the texts")
    args = parser.parse_args(argv)
    mutations = tomllib.loads((ROOT / "test" / "mutations.toml").read_text())
    mutations = {name: mutations[name] for name in args.names or mutations}
    package = Path(importlib.util.find_spec("sglang").origin).parent
    if not args.fit:
        return 0 if check(package, mutations) else 1
    misfits = {name: misfit(package, mutation) for name, mutation in mutations.items()}
    gone = [f"{name}: {why}" for name, why in misfits.items() if why]
    print("\n".join([*gone, f"{len(gone)} of {len(mutations)} do not fit"]))
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
