"""The command line of scripts/patchset."""

import argparse
import os
import sys
from pathlib import Path

from overlay import diff, release
from overlay.plan import Plan, make_plan
from overlay.release import Checkout, ReleaseError

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Runs one command on the overlay under `root`; 1 if anything cannot be placed."""
    options = _parser().parse_args(arguments)
    try:
        config = release.load_config(root)
        checkout = getattr(options, "checkout", None)
        if checkout:
            tree = Checkout(checkout)
        else:
            version = getattr(options, "release", None) or config.release["version"]
            tree = release.fetch(version, config, root / ".cache")
        plan = make_plan(root, tree, config, only=options.only)
        _report(plan, tree)
        if plan.errors:
            print(f"{len(plan.errors)} errors; nothing is written", file=sys.stderr)
            return 1
        if plan.is_applied:
            print(f"{tree.label}: already applied; nothing to do", file=sys.stderr)
        else:
            options.run(plan, tree, config, options, root)
        return 0
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "patchset", description="Merges the overlay into a release of sglang."
    )
    parser.set_defaults(only="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    wheel = commands.add_parser("wheel", help="build the patched wheel")
    wheel.add_argument("--output", type=Path, metavar="DIR", help="default: dist")
    wheel.set_defaults(run=_wheel, only=release.PACKAGE)

    patch = commands.add_parser("diff", help="write the patch to submit upstream")
    patch.add_argument("--tree", type=Path, dest="checkout", metavar="CHECKOUT")
    patch.add_argument("--output", type=Path, metavar="FILE")
    patch.set_defaults(run=_diff)

    apply = commands.add_parser("apply", help="merge into a checkout of sglang")
    apply.add_argument("checkout", type=Path, metavar="CHECKOUT")
    apply.set_defaults(run=_apply)

    check = commands.add_parser(
        "check", help="say what would change, and write nothing"
    )
    tree = check.add_mutually_exclusive_group()
    tree.add_argument("checkout", type=Path, nargs="?", metavar="CHECKOUT")
    tree.add_argument("--release", metavar="VERSION")
    check.set_defaults(run=_check)
    return parser


def _report(plan: Plan, tree) -> None:
    """A line a file, on stderr so that `diff` can write to stdout."""
    for change in plan.changes:
        added, removed = change.counts
        kind = " (new)" if change.old is None else ""
        print(f"{added:+6d} {-removed:+6d}  {change.path}{kind}", file=sys.stderr)
    for path in plan.skipped:
        print(
            f"      skipped  {path}: no such file, or no place in it", file=sys.stderr
        )
    for error in plan.errors:
        print(f"error: {error}", file=sys.stderr)


def _wheel(plan: Plan, tree, config, options, root: Path) -> None:
    changed = {c.path: c.new for c in plan.changes}
    print(release.repack(tree, changed, config, options.output or root / "dist"))


def _diff(plan: Plan, tree, config, options, root: Path) -> None:
    patch = diff.patch(plan.changes, root, config)
    if options.output:
        options.output.write_bytes(patch)
    else:
        sys.stdout.buffer.write(patch)


def _apply(plan: Plan, tree, config, options, root: Path) -> None:
    """Writes all files beside their targets first, so that a full disk changes none."""
    staged = {}
    try:
        for change in plan.changes:
            target = tree.path / change.path
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.patchset")
            staged[beside] = target
            beside.write_bytes(change.new)
            if target.exists():
                beside.chmod(target.stat().st_mode)
        for beside, target in staged.items():
            os.replace(beside, target)
    finally:
        for beside in staged:
            beside.unlink(missing_ok=True)


def _check(plan: Plan, tree, config, options, root: Path) -> None:
    print(
        f"{tree.label}: everything can be placed; {len(plan.changes)} files to change"
    )


if __name__ == "__main__":
    sys.exit(main())
