"""scripts/bench_serving.py --rehearse as a user runs it, with real servers on the CPU:
interrupted while it measures, gone on with, and looked at."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_serving.py"
RUN = "1-flashinfer_trtllm_8x4"


def start(results: Path) -> subprocess.Popen:
    grid = ["--servers", "flashinfer_trtllm_8x4", "--concurrency", "2"]
    command = [sys.executable, SCRIPT, results, "--rehearse", *grid]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def servers(results: Path) -> list[psutil.Process]:
    """The running processes whose log is in the folder."""
    return [
        p
        for p in psutil.process_iter(["cwd", "status"])
        if str(p.info["cwd"]).startswith(str(results))
        if p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def waited_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def all_ended(results: Path) -> bool:
    """A killed process may take a moment to give its memory back."""
    return waited_for(lambda: not servers(results), 10)


def test_a_rehearsal_that_is_interrupted_goes_on_and_ends_in_a_report(tmp_path):
    results = tmp_path / "results"
    first = results / RUN / "prefill-c2.jsonl"
    session = start(results)
    assert waited_for(first.exists, 600)
    assert servers(results)
    session.send_signal(signal.SIGTERM)
    told = session.communicate(timeout=120)[1]
    assert session.returncode == 130
    assert "the same command goes on from here" in told
    assert all_ended(results)
    made = first.stat().st_mtime_ns

    session = start(results)
    told = session.communicate(timeout=800)[1]
    assert session.returncode == 0, told
    assert first.stat().st_mtime_ns == made
    assert all_ended(results)
    check_files(results)
    # Nothing is left to be done: no server is started.
    logs = len(list(results.glob(f"{RUN}/server-*.log")))
    assert start(results).wait(timeout=120) == 0
    assert len(list(results.glob(f"{RUN}/server-*.log"))) == logs == 2


def check_files(results: Path) -> None:
    run = results / RUN
    cases = ("prefill", 64, 2), ("decode", 16, 6)
    for case, tokens_in, tokens_out in cases:
        row = json.loads((run / f"{case}-c2.jsonl").read_text())
        assert row["tag"] == "rehearsal"
        assert row["completed"] == 12
        assert row["total_input_tokens"] == 12 * tokens_in
        assert row["total_output_tokens"] == 12 * tokens_out
    updated = json.loads((run / "updated.json").read_text())
    assert updated["rehearsal"] and updated["questions"] == 3
    assert len(updated["update_s"]) == 5 and updated["accuracy"] <= 1
    log = (run / "server-2.log").read_text()
    assert log.count('POST /update_weights_from_disk HTTP/1.1" 200') == 5
    for log in run.glob("*.log"):
        assert log.read_text().startswith("REHEARSAL")
    checked = (results / "self_check.txt").read_text()
    assert checked.startswith("REHEARSAL") and "WRONG" not in checked
    assert re.search(r"flashinfer_trtllm +\[576, 1536\] +129", checked)
    environment = (results / "environment.json").read_text()
    assert json.loads(environment)["rehearse"]
    for private in (str(results), str(SCRIPT.parents[1]), str(Path.home())):
        assert private not in environment
    report = (results / "report.md").read_text()
    assert report.startswith("REHEARSAL")
    # K = 576 has no trtllm kernel, and N = 576 no 8x4 layout.
    assert "flashinfer_trtllm_8x4 (no layer uses 8x4)" in report
    assert len(list((results / "plots").glob("*.png"))) == 3
