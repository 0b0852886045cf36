"""What follows the servers: the kernels alone, the report, the pull request."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from serving.progress import say

KERNELS = Path("benchmark", "kernels", "quantization", "bench_mxfp8_linear.py")


def measure_kernels(
    root: Path, folder: Path, rehearsal: bool, env: Mapping[str, str]
) -> list[str]:
    """Write kernels.jsonl, and its tables as kernels.md, unless they are there.

    Returns what failed.
    """
    output = folder / "kernels.jsonl"
    if output.exists():
        return []
    say("The kernels alone")
    partial = folder / "kernels.partial.jsonl"
    partial.unlink(missing_ok=True)
    arguments = ["--output", str(partial), *(["--rehearse"] if rehearsal else [])]
    with (folder / "kernels.md").open("w") as tables:
        failed = run_script(root / KERNELS, arguments, env, tables)
    if not failed:
        partial.replace(output)
    return failed


def make_report(root: Path, folder: Path) -> list[str]:
    """Write report.md and the plots. Returns what failed."""
    say("The report")
    return run_script(root / "scripts" / "report.py", [str(folder)], os.environ)


def make_pull_request(root: Path, folder: Path, rehearsal: bool) -> list[str]:
    """Rehearse it, or say how to write it. Returns what failed."""
    script = root / "scripts" / "make_pr.py"
    if not rehearsal:
        shown = shlex.join([os.path.relpath(script), os.path.relpath(folder)])
        say(f"The pull request is written by\n  {shown}")
        return []
    say("The pull request")
    return run_script(script, [str(folder), "--rehearse"], os.environ)


def run_script(
    path: Path,
    arguments: list[str],
    env: Mapping[str, str],
    output: TextIO | None = None,
) -> list[str]:
    """Run one of our programs; it prints to `output` or to stdout. Returns what failed."""
    program = subprocess.run(
        [sys.executable, "-W", "ignore", str(path), *arguments],
        check=False,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
    )
    if program.returncode == 0:
        return []
    return [f"{path.name} ends with exit status {program.returncode}; see above"]
