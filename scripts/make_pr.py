#!/usr/bin/env python3
"""Write the pull request for upstream, from the diff and a results folder.

    make_pr.py RESULTS [--tree CHECKOUT] [--output DIR] [--rehearse]

Into DIR (RESULTS/pr) go title.txt, body.md and the commits as patches for `git am`. With
--tree they are made for the HEAD of that checkout of sglang, and become a branch of it;
its work tree, its index and its current branch stay as they are. Nothing is written where
results are missing, a rehearsal's or of another revision, or upstream's checks fail.

Runs in the environment that scripts/setup.sh makes.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Writes one pull request from the overlay under `root`; 1 if it cannot."""
    options = parse(arguments)
    from evidence import ResultsError
    from overlay.release import ReleaseError
    from pull_request.check import PrError
    from pull_request.lint import LintError
    from pull_request.write import write_pull_request

    try:
        write_pull_request(
            root,
            options.results,
            options.output or options.results / "pr",
            options.tree,
            options.branch,
            options.rehearse,
        )
    except (PrError, ResultsError, ReleaseError, LintError) as error:
        print(f"error: {error}\nnothing is written", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="RESULTS")
    parser.add_argument("--tree", type=Path, metavar="CHECKOUT")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--branch", default="", help="its name (see upstream.toml)")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="take a rehearsal's results: every file says so, and no branch is made",
    )
    options = parser.parse_args(arguments)
    if not (options.results / "plan.json").is_file():
        parser.error(
            f"{options.results} is no results folder: it has no plan.json, which "
            "scripts/bench_serving_sm100.py writes"
        )
    if options.branch and not options.tree:
        parser.error("--branch needs the --tree to make it in")
    if options.tree and not options.tree.is_dir():
        parser.error(f"--tree {options.tree} is no folder")
    return options


def go_on_in_venv() -> None:
    """Replace this process by one of .venv, which has what scripts/overlay needs."""
    if Path(sys.prefix) != PYTHON.parents[1]:
        if not PYTHON.exists():
            sys.exit("error: there is no .venv: run scripts/setup.sh first")
        os.execv(PYTHON, [PYTHON, __file__, *sys.argv[1:]])


if __name__ == "__main__":
    go_on_in_venv()
    sys.exit(main())
