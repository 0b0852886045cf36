"""tune_mxfp8_layout.py --compare without a GPU: FlashInfer's kernels are emulated."""

import subprocess
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmark/kernels/quantization"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for a CPU")
def test_what_fits_is_timed_and_the_rest_is_named():
    command = [
        FOLDER / "tune_mxfp8_layout.py",
        "--compare",
        "--rehearse",
        "--m",
        "3",
        "1",
    ]
    command += ["--shapes", "256,512", "160,256"]
    told = subprocess.check_output(command, text=True)
    rows = [
        line.strip("| ").split(" | ") for line in told.splitlines() if " x " in line
    ]
    _, *rows = [[cell.replace(".", "").isdigit() for cell in row[2:]] for row in rows]
    # bf16, weight_only, trtllm 128x4, trtllm 8x4, cutlass, Triton
    assert rows == 2 * [[*5 * [True], False]] + 2 * [
        [True, True, True, False, True, False]
    ]
    assert "says nothing about speed" in told
    assert "- triton [256, 512]: it needs an SM100 or SM103 GPU" in told
    assert "- flashinfer_trtllm 8x4 [160, 256]: N = 160" in told
