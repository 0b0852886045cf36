"""Writes the folder of a pull request, and its branch."""

import os
import sys
import tempfile
import tomllib
from pathlib import Path

from evidence import Results, load_results
from overlay import release
from overlay.plan import Plan, make_plan
from overlay.release import PACKAGE, Config, ReleaseError
from pull_request import body, check, lint
from pull_request.body import MARK, Draft
from pull_request.check import PrError
from pull_request.lint import Checks
from pull_request.series import Commit, Repository, Series, split
from staging import staged_directory

TEMPLATES = (".github/pull_request_template.md", ".github/PULL_REQUEST_TEMPLATE.md")
LONGEST_BODY = 65536  # characters, GitHub's limit


def write_pull_request(
    root: Path,
    folder: Path,
    output: Path,
    checkout: Path | None,
    branch: str,
    rehearse: bool,
) -> None:
    """Write the pull request of the overlay under `root`, with the results in `folder`,
    into `output` and, but for a rehearsal, as a branch of `checkout`.

    Raises PrError, ResultsError, ReleaseError or LintError, and then writes nothing.
    """
    results = load_results(folder)
    check.check_results(results, rehearse)
    check.check_output(output)
    plots = check.find_plots(results)
    config = release.load_config(root)
    settings = tomllib.loads((root / "upstream.toml").read_text())
    wheel = release.fetch(config.release["version"], config, root / ".cache")
    measured = _plan(root, wheel, config)
    check.check_revision(results, measured, wheel, config, root)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        tree = Commit(Repository(checkout, scratch)) if checkout else wheel
        plan = _plan(root, tree, config) if checkout else measured
        series = _series(tree, plan, settings, results, config, root, scratch)
        branch = branch or settings["pr"]["branch"]
        makes_branch = checkout and not rehearse
        if makes_branch:
            series.check_branch(branch)
        draft = Draft(
            words=settings["pr"],
            version=config.version,
            results=results,
            plots=plots,
            plots_folder=Path(os.path.relpath(folder, output)).as_posix(),
            series=series,
            checks=_lint(series, tree, settings["lint"], scratch),
            base=tree.label,
            differ=_differing(measured, plan),
            template=_template(tree),
        )
        _write(output, draft)
        if makes_branch:
            series.make_branch(branch)
            print(f"branch {branch} of {checkout}: {len(series.parts)} commits")


def _plan(root: Path, tree, config: Config) -> Plan:
    plan = make_plan(root, tree, config)
    if plan.errors:
        raise ReleaseError("\n".join(plan.errors))
    if plan.is_applied:
        raise PrError(f"{tree.label} has the whole change already")
    return plan


def _series(
    tree,
    plan: Plan,
    settings: dict,
    results: Results,
    config: Config,
    root: Path,
    scratch: Path,
) -> Series:
    for path in plan.skipped:
        print(f"skipped {path}: {tree.label} has no place for it", file=sys.stderr)
    parts = split(plan.changes, settings["pr"]["commits"], root, config)
    return Series(tree, parts, results, config, scratch)


def _differing(measured: Plan, plan: Plan) -> tuple[str, ...]:
    """The package's files that `plan` leaves with other text than was measured."""
    theirs = {change.path: change.new for change in measured.changes}
    return tuple(
        change.path
        for change in plan.changes
        if change.path.startswith(PACKAGE) and theirs.get(change.path) != change.new
    )


def _lint(series: Series, tree, settings: dict, scratch: Path) -> Checks:
    """Upstream's checks on the merged files: the checkout's own, or upstream.toml's."""
    own = tree.read(lint.CONFIG) if tree.is_checkout else None
    if own is not None:
        checks = lint.read_checks(own.decode(), f"{tree.label}'s {lint.CONFIG}")
    else:
        checks = lint.make_checks(settings, "upstream.toml's [lint]")
    set_up = settings["setup"] if own is None else {}
    lint.run_checks(checks, series.export(scratch / "merged", set_up), series.paths)
    return checks


def _template(tree) -> str:
    found = (tree.read(path) for path in TEMPLATES if tree.is_checkout)
    return next((text.decode() for text in found if text is not None), "")


def _write(output: Path, draft: Draft) -> None:
    """The whole folder, or nothing of it."""
    text = body.description(draft)
    files = {"title.txt": body.title(draft).encode(), "body.md": text.encode()}
    mark = MARK.encode() if draft.results.plan.rehearsal else b""
    for name, patch in draft.series.patches().items():
        files[name] = mark + patch
    with staged_directory(output) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    print(f"Wrote {output}: {', '.join(files)}")
    if len(text) > LONGEST_BODY:
        print(
            f"body.md has {len(text)} characters, and GitHub takes {LONGEST_BODY}: move "
            "folded tables to a comment",
            file=sys.stderr,
        )
    if draft.plots:
        print("GitHub shows no local plots: drop them where body.md links to them")
