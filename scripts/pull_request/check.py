"""Whether a results folder is evidence for the change as it is now."""

import subprocess
import tempfile
from pathlib import Path

from evidence import Results, wheel_digest
from overlay import release
from overlay.plan import Plan
from overlay.release import PACKAGE, Config

COMPARED = ("triton", "flashinfer_cutlass", "flashinfer_trtllm")


class PrError(Exception):
    """Why no pull request can be written; says the way out."""


def check_results(results: Results, rehearse: bool) -> None:
    """Raises PrError unless a pull request can be made from these results."""
    plan, where = results.plan, results.path
    if plan.rehearsal and not rehearse:
        raise PrError(
            f"{where} is a rehearsal, which says nothing about speed or accuracy: "
            "measure on an SM100 GPU with scripts/bench_serving_sm100.py, or give "
            "--rehearse for a folder that is marked as one"
        )
    if rehearse and not plan.rehearsal:
        raise PrError(f"{where} is no rehearsal: leave out --rehearse")
    if results.missing:
        raise PrError(
            f"{where} lacks {len(results.missing)} of its planned runs: "
            f"{', '.join(results.missing)}. The same scripts/bench_serving_sm100.py "
            "command makes them, and keeps what is there"
        )
    if not plan.rehearsal:
        _check_measured(results)


def _check_measured(results: Results) -> None:
    """That the evidence is what upstream's reviewers ask for."""
    plan, where = results.plan, results.path
    names = {server.name for server in plan.servers}
    if absent := [name for name in COMPARED if name not in names]:
        raise PrError(
            f"{where} was planned without {', '.join(absent)}: the pull request "
            f"compares {', '.join(COMPARED)}. Measure them all, into a new folder"
        )
    if plan.gsm8k is None:
        raise PrError(
            f"{where} was planned without GSM8K, and the pull request needs an "
            "accuracy. Measure with it, into a new folder"
        )
    gpus = {tuple(g.name for g in e.gpu) for e in results.environments}
    if len(gpus) != 1 or () in gpus:
        found = " and ".join(", ".join(names) or "no GPU" for names in sorted(gpus))
        raise PrError(
            f"{where} was measured on {found or 'nothing'}, and should be on the same "
            "GPUs throughout. Measure again, into a new folder"
        )


def check_output(output: Path) -> None:
    """Raises PrError where the folder to write would take the place of another."""
    if output.exists() and not (output / "body.md").is_file():
        raise PrError(f"{output} is there and holds no pull request: remove it first")


def find_plots(results: Results) -> list[str]:
    """The names of the report's plots. Raises PrError where they are not up to date."""
    file, command = results.path / "report.md", f"scripts/report.py {results.path}"
    if not file.is_file():
        raise PrError(f"there is no {file}: {command} writes it, and its plots")
    last = max((run.path / "done").stat().st_mtime_ns for run in results.runs)
    if file.stat().st_mtime_ns < last:
        raise PrError(f"{file} is older than the last run: {command} writes it anew")
    return sorted(plot.stem for plot in (results.path / "plots").glob("*.png"))


def check_revision(
    results: Results, measured: Plan, wheel: release.Wheel, config: Config, root: Path
) -> None:
    """Raises PrError unless the results are of the wheel that this tree makes."""
    files = {c.path: c.new for c in measured.changes if c.path.startswith(PACKAGE)}
    with tempfile.TemporaryDirectory() as directory:
        built = release.repack(wheel, files, config, Path(directory))
        ours = wheel_digest(built)
    theirs = results.plan.revision
    if ours == theirs.wheel:
        return
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    told = subprocess.run(git, capture_output=True, text=True, check=False)
    state = "-dirty" if theirs.dirty else ""
    raise PrError(
        f"{results.path} measured another revision:\n"
        f"  measured   {theirs.git}{state}, digest of its files {theirs.wheel}\n"
        f"  this tree  {told.stdout.strip() or 'no git'}, digest of its files {ours}\n"
        "Check out the measured revision and run this again, or measure this tree "
        "with scripts/bench_serving_sm100.py, into a new folder"
    )
