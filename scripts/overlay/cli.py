"""The command line of scripts/patchset."""

import argparse
import sys
from pathlib import Path

from overlay import check, diff, lock, release, stack
from overlay.plan import Plan, make_plan
from overlay.release import ReleaseError

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Runs one command on the overlay under `root`; 1 if anything is refused."""
    options = _parser().parse_args(arguments)
    try:
        told, code = _run(options, root), 0
    except (ReleaseError, OSError) as error:
        told, code = f"error: {error}", 1
    print(told, file=sys.stderr)  # stdout is for the patch, and for the wheel's name
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("patchset", description="Merges the overlay.")
    parser.set_defaults(checkout=None, output=None, pr=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    number = lambda name: int(name.split("-")[0])
    for run in (_wheel, _diff, _apply, _check, _lock):
        command = commands.add_parser(run.__name__[1:], help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--release", metavar="VERSION")
        command.add_argument("--upto", type=number, metavar="N")
    wheel, patch, apply, checks, _ = commands.choices.values()
    wheel.add_argument("--output", type=Path, metavar="DIR", default=Path("dist"))
    patch.add_argument("--tree", type=Path, dest="checkout", metavar="CHECKOUT")
    patch.add_argument("--output", type=Path, metavar="FILE", help="default: stdout")
    patch.add_argument("--pr", type=number, metavar="N", help="its patch alone")
    apply.add_argument("checkout", type=Path, metavar="CHECKOUT")
    checks.add_argument("checkout", type=Path, nargs="?", metavar="CHECKOUT")
    return parser


def _run(options: argparse.Namespace, root: Path) -> str:
    """Makes the plan, refuses or runs the command, and returns what to say at the end."""
    tree = release.checkout(options.checkout) if options.checkout else None
    version = options.release or (tree and tree.version)
    config, parts = stack.read(root, version, options.pr or options.upto)
    locked, ours = lock.read(root), config["release"]["version"]
    fetch = lambda version: release.fetch(version, config, root / ".cache")
    tree = tree or fetch(version or ours)
    plan = make_plan(parts, tree)
    is_known = tree.wheel and tree.version == ours and ours in locked  # by its sha256
    if options.run is _check or not (is_known or options.run is _lock):
        base = lambda: make_plan(parts, fetch(ours)).edited
        plan.errors += lock.drift(plan.edited, locked.get(ours, {}), ours, base)
    lines = []
    for part, changes in plan.steps:
        lines += [part.name] if part.name else []
        lines += [f"{'changed' if c.old else 'new':>8}  {c.path}" for c in changes]
    lines += [f" skipped  {path}: {why}" for path, why in plan.skipped.items()]
    lines += [f"error: {error}" for error in plan.errors]
    print("\n".join(lines), file=sys.stderr)
    if plan.errors:
        again = "" if tree.wheel else "; if it was patched before, restore it first"
        raise ReleaseError(f"{len(plan.errors)} problems, nothing is written{again}")
    if not plan.changes:
        return f"{tree.label}: already applied; nothing to do"
    return options.run(plan, tree, config, options, root)


def _wheel(plan: Plan, tree, config, options, root: Path) -> str:
    """build the patched wheel"""
    options.output.mkdir(parents=True, exist_ok=True)
    print(wheel := release.repack(tree, plan.package, config, options.output))
    return f"Next: pip install {wheel}"


def _diff(plan: Plan, tree, config, options, root: Path) -> str:
    """write the changes as patches, with their reasons"""
    steps = plan.steps[-1:] if options.pr else plan.steps
    patch = b"".join(diff.patch(changes, part) for part, changes in steps if changes)
    if options.output is None:
        sys.stdout.buffer.write(patch)
    else:
        options.output.write_bytes(patch)
    return f"Next, in a checkout of {tree.label}: git am {options.output or 'PATCH'}"


def _apply(plan: Plan, tree, config, options, root: Path) -> str:
    """merge into a checkout of sglang"""
    release.write(tree.path, {change.path: change.new for change in plan.changes})
    told = f"Merged {len(plan.changes)} files into {tree.path}. Next, there: "
    return told + "`git diff`, `pip install -e python`, `pre-commit run --all-files`"


def _check(plan: Plan, tree, config, options, root: Path) -> str:
    """say what would change, lint and import it, and write nothing"""
    failed, imported = check.imports(plan.package, tree, root)
    found = [problem for _, changes in plan.steps for problem in check.lint(changes)]
    if problems := found + failed:
        raise ReleaseError("the merged files fail:\n" + "\n".join(problems))
    print(f"{tree.label}: {len(plan.changes)} files to change, all edits can be placed")
    return imported


def _lock(plan: Plan, tree, config, options, root: Path) -> str:
    """record the release's definitions"""
    if options.upto or tree.version != config["release"]["version"]:
        raise ReleaseError("only all edits of a release are recorded, and only on it")
    lock.write(root, tree.version, plan.edited)
    return f"{sum(map(len, plan.edited.values()))} definitions are in {lock.NAME}"


if __name__ == "__main__":
    sys.exit(main())
