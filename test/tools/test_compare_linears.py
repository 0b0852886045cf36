"""tune_mxfp8_layout.py --compare without a GPU: FlashInfer's kernels are emulated."""

import subprocess
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmark/kernels/quantization"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for a CPU")
def test_what_fits_is_timed_and_the_rest_is_named():
    flags = "--compare --rehearse --m 3 1 --shapes 256,512 160,256".split()
    command = [FOLDER / "tune_mxfp8_layout.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    told = done.stdout + done.stderr
    rows = [line.split(" | ")[2:] for line in told.splitlines() if "| 3 |" in line]
    rows = [[cell.strip(" |") != "-" for cell in row] for row in rows]
    # bf16, weight_only, trtllm 128x4, trtllm 8x4, cutlass, Triton
    assert rows == [[*5 * [True], False], [True, True, True, False, True, False]]
    assert "says nothing about speed" in told
    assert "Left out triton [256, 512]: it needs an SM100 or SM103 GPU" in told
    assert "Left out flashinfer_trtllm 8x4 [160, 256]: N = 160" in told
