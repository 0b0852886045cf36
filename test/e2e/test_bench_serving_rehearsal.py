"""scripts/bench_serving.py --rehearse as a user runs it, with real servers on the CPU:
interrupted while it measures, gone on with, and looked at. The model has random weights,
and SmolLM2's tokenizer."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from sglang.test.mxfp8_utils import tiny_llama_tensors, write_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_serving.py"
TOKENIZER = SCRIPT.parents[1] / ".cache" / "models" / "SmolLM2-135M-Instruct"


def start(results: Path) -> subprocess.Popen:
    flags = ["--model", results.with_name("model"), "--bf16-model", ""]
    flags += ["--servers", "flashinfer_trtllm_8x4", "--concurrency", "2"]
    command = [sys.executable, SCRIPT, results, "--rehearse", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def servers(results: Path) -> list[psutil.Process]:
    """The running processes whose log is in the folder."""
    return [
        process
        for process in psutil.process_iter(["cwd", "status"])
        if str(process.info["cwd"]).startswith(str(results))
        if process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def waited_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_a_rehearsal_that_is_interrupted_goes_on_and_ends_in_a_report(tmp_path):
    size = dict(vocab_size=49152)  # the tokenizer's
    write_checkpoint(str(tmp_path / "model"), tiny_llama_tensors(**size), **size)
    for file in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "model")
    results = tmp_path / "results"
    run = results / "1-flashinfer_trtllm_8x4"
    made = run / "prefill-c2.jsonl", results / "self_check.txt"
    session = start(results)
    assert waited_for(made[0].exists, 600) and servers(results)
    session.send_signal(signal.SIGTERM)
    told = session.communicate(timeout=120)[1]
    assert session.returncode == 130
    assert "the same command goes on from here" in told
    # A killed process may take a moment to give its memory back.
    assert waited_for(lambda: not servers(results), 10)
    before = [file.stat().st_mtime_ns for file in made]

    session = start(results)
    told = session.communicate(timeout=800)[1]
    assert session.returncode == 0, told
    assert [file.stat().st_mtime_ns for file in made] == before
    assert waited_for(lambda: not servers(results), 10)

    for case, tokens_in, tokens_out in (("prefill", 64, 2), ("decode", 16, 6)):
        row = json.loads((run / f"{case}-c2.jsonl").read_text())
        totals = row["total_input_tokens"], row["total_output_tokens"]
        assert row["completed"] == 12 and totals == (12 * tokens_in, 12 * tokens_out)
        assert row["tag"] == "rehearsal"
    updated = json.loads((run / "updated.json").read_text())
    assert updated["rehearsal"] and updated["questions"] == 3
    assert len(updated["update_s"]) == 5 and updated["accuracy"] <= 1
    log = (run / "server-2.log").read_text()
    assert log.count('POST /update_weights_from_disk HTTP/1.1" 200') == 5
    checked = made[1].read_text()
    for text in (checked, *(log.read_text() for log in run.glob("*.log"))):
        assert text.startswith("REHEARSAL")
    assert re.search(r"flashinfer_trtllm +\[640, 512\] +128 8x4", checked)
    assert "WRONG" not in checked
    report = (results / "report.md").read_text()
    assert report.startswith("REHEARSAL")
    assert "\n- flashinfer_trtllm_8x4: 4 on flashinfer_trtllm, 8x4 scales" in report
    assert len(list((results / "plots").glob("*.png"))) == 3
