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
PYTEST = "-m pytest -x -rf -p no:cacheprovider".split()
SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_MXFP8_EMULATION": "1",
    "SGLANG_TEST_MAX_RETRY": "0",
    "OMP_NUM_THREADS": "1",
}


def run_tests(package: Path, tests: list[str], changed: dict[str, str]) -> str:
    """ "survived", "killed by" the test that failed, or what else went wrong, with a copy
    of the package (links) in which some files have another text."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy, log = Path(folder, package.name), Path(folder, "log")
        shutil.copytree(package, copy, copy_function=os.symlink)
        for name, text in changed.items():
            file = copy / name
            for old in (file, *file.parent.glob(f"__pycache__/{file.stem}.*")):
                old.unlink()
            file.write_text(text)
        path = os.pathsep.join([folder, str(ROOT / "scripts" / "cpu_stand_ins")])
        environment = {**os.environ, **SETTINGS, "PYTHONPATH": path}
        options = dict(cwd=ROOT / "test" / "registered", env=environment)
        command = [sys.executable, *PYTEST, *tests]
        status = run_process(command, log, TIMEOUT_S, **options)
        told = log.read_text()
    failed = re.search(r"(?m)^(?:SUB)?FAILED.* \S*::(\S+)", told)
    if status == 1 and failed:
        return f"killed by {failed[1]}"
    if status == 0 and re.search(r"\d passed", told):
        return "survived"
    return f"pytest ended with {status}: {told[-800:]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations (all)")
    parser.add_argument("--fit", action="store_true", help="only look for the texts")
    args = parser.parse_args(argv)
    mutations = tomllib.loads((ROOT / "test" / "mutations.toml").read_text())
    mutations = {name: mutations[name] for name in args.names or mutations}
    package = Path(importlib.util.find_spec("sglang").origin).parent
    texts = {m["file"]: (package / m["file"]).read_text() for m in mutations.values()}
    found = {n: texts[m["file"]].count(m["find"]) for n, m in mutations.items()}
    gone = [f"{n}: its text is there {c} times" for n, c in found.items() if c != 1]
    print("\n".join([*gone, f"{len(gone)} of {len(mutations)} do not fit"]))
    if gone or args.fit:
        return 1 if gone else 0
    verdicts = []
    for tests in {tuple(m["tests"]) for m in mutations.values()}:
        verdicts.append(run_tests(package, tests, {}))
        print(f"| unmutated {' '.join(tests)} | {verdicts[-1]} |", flush=True)
    if set(verdicts) != {"survived"}:
        return 1
    verdicts = []
    for name, m in mutations.items():
        text = texts[m["file"]].replace(m["find"], m["replace"])
        verdicts.append(run_tests(package, m["tests"], {m["file"]: text}))
        cells = name, m["breaks"], m["file"], verdicts[-1]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0 if all(each.startswith("killed by") for each in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
