"""The command line of scripts/patchset."""

import argparse
import os
import sys
import tomllib
from pathlib import Path

from overlay import check, diff, lock, release
from overlay.plan import Plan, make_plan
from overlay.release import ReleaseError

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Runs one command on the overlay under `root`; 1 if anything is refused."""
    options = _parser().parse_args(arguments)
    try:
        _say(_run(options, root))
    except (ReleaseError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("patchset", description="Merges the overlay.")
    parser.set_defaults(checkout=None, release=None, output=None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, text in (
        (_wheel, "build the patched wheel"),
        (_diff, "write the change as a patch, with its reasons"),
        (_apply, "merge into a checkout of sglang"),
        (_check, "say what would change, lint and import it, and write nothing"),
        (_lock, f"record the release's definitions in {lock.NAME}"),
    ):
        command = commands.add_parser(run.__name__[1:], help=text, description=text)
        command.set_defaults(run=run)
    wheel, patch, apply, checks, _ = commands.choices.values()
    wheel.add_argument("--output", type=Path, metavar="DIR", default=Path("dist"))
    patch.add_argument("--tree", type=Path, dest="checkout", metavar="CHECKOUT")
    patch.add_argument("--output", type=Path, metavar="FILE", help="default: stdout")
    apply.add_argument("checkout", type=Path, metavar="CHECKOUT")
    tree = checks.add_mutually_exclusive_group()
    tree.add_argument("checkout", type=Path, nargs="?", metavar="CHECKOUT")
    tree.add_argument("--release", metavar="VERSION")
    return parser


def _run(options: argparse.Namespace, root: Path) -> str:
    """Makes the plan, refuses what it cannot do, and runs the command; returns what to
    say at the end."""
    _check_output(options)
    config = tomllib.loads((root / "upstream.toml").read_text())
    locked, ours = lock.read(root), config["release"]["version"]
    if options.checkout:
        tree = release.checkout(options.checkout)
    else:
        tree = release.fetch(options.release or ours, config, root / ".cache")
    plan = make_plan(root, tree, config)
    if tree.wheel and tree.version == ours and ours in locked:  # by its sha256
        if options.run is _check and locked[ours] != lock.hashes(plan.edited):
            plan.errors.append(f"{lock.NAME} is out of date: run scripts/patchset lock")
    elif options.run is not _lock:
        recorded = next((v for v in (tree.version, ours, *locked) if v in locked), ours)
        wheel = lambda: release.fetch(recorded, config, root / ".cache")
        base = lambda: make_plan(root, wheel(), config).edited
        plan.errors += lock.drift(plan.edited, locked.get(recorded, {}), recorded, base)
    lines = [f"{'changed' if c.old else 'new':>8}  {c.path}" for c in plan.changes]
    lines += [f" skipped  {path}: {why}" for path, why in plan.skipped.items()]
    _say("\n".join([*lines, *(f"error: {error}" for error in plan.errors)]))
    if plan.errors:
        again = "" if tree.wheel else "; if it was patched before, restore it first"
        raise ReleaseError(f"{len(plan.errors)} problems, nothing is written{again}")
    if not plan.changes:
        return f"{tree.label}: already applied; nothing to do"
    return options.run(plan, tree, config, options, root)


def _say(text: str) -> None:
    """On stderr: stdout is for the patch, and for the wheel's name."""
    print(text, file=sys.stderr)


def _check_output(options: argparse.Namespace) -> None:
    """Refuses what cannot be written before the work, not after it."""
    if options.run is _wheel:
        options.output.mkdir(parents=True, exist_ok=True)
    elif options.output:
        is_new = not options.output.exists()
        options.output.open("ab").close()
        if is_new:
            options.output.unlink()


def _wheel(plan: Plan, tree, config, options, root: Path) -> str:
    print(wheel := release.repack(tree, plan.package, config, options.output))
    return f"Next: pip install {wheel}"


def _diff(plan: Plan, tree, config, options, root: Path) -> str:
    patch = diff.patch(plan.changes, root, config)
    if options.output is None:
        sys.stdout.buffer.write(patch)
    elif options.output.exists() and not options.output.is_file():  # a pipe, a device
        options.output.write_bytes(patch)
    else:
        _write({options.output: patch})
    return f"Next, in a checkout of {tree.label}: git am {options.output or 'PATCH'}"


def _apply(plan: Plan, tree, config, options, root: Path) -> str:
    _write({tree.path / change.path: change.new for change in plan.changes})
    return (
        f"Merged {len(plan.changes)} files into {tree.path}. Next, there: `git diff` shows "
        "them, `pip install -e python` installs sglang with its new FlashInfer, and "
        "`pre-commit run --all-files` runs upstream's other checks"
    )


def _check(plan: Plan, tree, config, options, root: Path) -> str:
    failed, imported = check.imports(plan.package, tree)
    if problems := check.lint(plan.changes) + failed:
        raise ReleaseError("the merged files fail:\n" + "\n".join(problems))
    print(f"{tree.label}: {len(plan.changes)} files to change, all edits can be placed")
    return imported


def _lock(plan: Plan, tree, config, options, root: Path) -> str:
    lock.write(root, tree.version, plan.edited)
    return f"{sum(map(len, plan.edited.values()))} definitions are in {lock.NAME}"


def _write(files: dict[Path, bytes]) -> None:
    """Writes all files beside their targets first, so that a full disk changes none."""
    staged = {}
    try:
        for target, content in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            staged[target] = target.with_name(f".{target.name}.patchset")
            staged[target].write_bytes(content)
            if target.exists():
                staged[target].chmod(target.stat().st_mode)
        for target, beside in staged.items():
            os.replace(beside, target)
    finally:
        for beside in staged.values():
            beside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
