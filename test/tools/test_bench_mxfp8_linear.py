"""The kernel benchmark without a GPU: FlashInfer's kernels are emulated."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmark/kernels/quantization"
sys.path.append(str(FOLDER))

import mxfp8_timing as timing

pytestmark = pytest.mark.skipif(timing.HAS_GPU, reason="the rehearsal is for a CPU")


def test_a_rehearsal_measures_everything_that_fits():
    script = FOLDER / "bench_mxfp8_linear.py"
    shapes = ("--shapes", "256,512", "160,256", "--m", "3", "1")
    command = [script, *shapes, "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    found = [tuple(row[:2]) for row in rows if row[0].isdigit()]
    names = timing.BF16, timing.WEIGHT_ONLY, *timing.FLASHINFER
    expected = [(m, name) for m in "13" for name in names]
    # An 8x4 layer has N % 128 == 0.
    expected += [pair for pair in expected if not pair[1].endswith(" 8x4")]
    assert sorted(found) == sorted(expected)
    assert len({len(row) for row in rows}) == 1
    assert timing.REHEARSAL in done.stdout
    assert "- triton [256, 512]: it needs an SM100 or SM103 GPU" in done.stdout
    assert "- flashinfer_trtllm 8x4 [160, 256]: N = 160" in done.stdout
