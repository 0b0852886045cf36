"""scripts/bench_serving_sm100.py --rehearse as a user runs it, on one server and one
concurrency: killed in the middle, gone on with, and looked at."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from evidence import load_results

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_serving_sm100.py"
RUN = "1-flashinfer_cutlass"


def command(results: Path, *arguments: str) -> list[str]:
    grid = ["--backends", "flashinfer_cutlass", "--concurrency", "2"]
    return [sys.executable, str(SCRIPT), str(results), "--rehearse", *grid, *arguments]


def run(results: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(results, *arguments), capture_output=True, text=True, timeout=800
    )


def kill_once_a_server_runs(results: Path) -> psutil.Process:
    """Start a session, end it with SIGKILL; returns the server that it leaves."""
    note = results / "runs" / RUN / "server.pid"
    with subprocess.Popen(command(results), stderr=subprocess.DEVNULL) as session:
        deadline = time.monotonic() + 120
        while not (note.exists() and note.read_text()):
            assert session.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        session.kill()
    return psutil.Process(json.loads(note.read_text())["pid"])


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_rehearsal_that_is_killed_goes_on_and_ends_in_a_report(tmp_path):
    results = tmp_path / "results"
    left = kill_once_a_server_runs(results)
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        assert is_running(left)
        other = run(results, "--repeats", "2")
        assert other.returncode == 1
        assert "- repeats: 1 there, 2 here" in other.stderr
        assert is_running(left)

        told = run(results)
        assert told.returncode == 0, told.stderr
        assert not is_running(left)
        assert bystander.poll() is None
    finally:
        os.killpg(bystander.pid, signal.SIGKILL)
        bystander.wait()
    assert "stopped the server that a killed session left" in told.stderr
    assert told.stderr.count("says nothing about speed") >= 2
    assert told.stdout.splitlines()[-1] == f"Results: {results}"
    check(results)


def check(results: Path) -> None:
    found = load_results(results)
    assert found.missing == ()
    assert found.plan.rehearsal
    (run,) = found.runs
    assert (run.launch.environment, len(found.environments)) == (1, 2)
    assert "on flashinfer_cutlass" in run.launch.routing
    assert sorted(run.bench) == [("decode", 2), ("prefill", 2)]
    for case in found.plan.cases:
        row = run.bench[case.name, 2]
        assert row.total_input_tokens == row.completed * case.input_len
        assert row.total_output_tokens == row.completed * case.output_len
        assert row.median_ttft_ms > 0
    (update,) = run.updates
    assert update > 0
    answers = (run.path / "tmp_output_gsm8k.txt").read_text()
    assert answers.count("Question: Omar had 50 stamps") == 1
    assert run.gsm8k.questions == 3
    log = (run.path / "server.log").read_text()
    assert 'POST /update_weights_from_disk HTTP/1.1" 200' in log
    assert (results / "runs" / f"{RUN}.interrupted-1" / "server.log").exists()
    assert found.kernels and all(row.rehearsal for row in found.kernels)
    for name in ("report.md", "pr/body.md"):
        assert "rehearsal" in (results / name).read_text().lower()
    for suffix in ("png", "svg"):
        assert list((results / "plots").glob(f"*.{suffix}"))
