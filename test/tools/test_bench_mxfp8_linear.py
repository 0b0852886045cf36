"""The kernel benchmarks without a GPU: FlashInfer's kernels are emulated, or stubs."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmark/kernels/quantization"
sys.path.append(str(FOLDER))

import bench_mxfp8_linear as bench
import mxfp8_timing as timing

pytestmark = pytest.mark.skipif(timing.HAS_GPU, reason="the rehearsal is for a CPU")


def run(*command, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_rehearsal_measures_everything_that_fits():
    script = FOLDER / "bench_mxfp8_linear.py"
    shapes = ("--shapes", "256,512", "160,256", "--m", "3", "1")
    done = run(script, *shapes, "--rehearse")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    found = [tuple(row[:3]) for row in rows if row[0].isdigit()]
    halves = list(product(("linear", "quantize", "gemm"), bench.FLASHINFER))
    halves += [("linear", bench.BF16), ("copy", bench.BF16)]
    expected = [(m, *half) for m in "13" for half in halves]
    # An 8x4 layer has N % 128 == 0.
    expected += [half for half in expected if not half[2].endswith(" 8x4")]
    assert sorted(found) == sorted(expected)
    assert len({len(row) for row in rows}) == 1
    assert timing.REHEARSAL in done.stdout
    assert "- triton [256, 512]: it needs an SM100 or SM103 GPU" in done.stdout
    assert "- flashinfer_trtllm 8x4 [160, 256]: N = 160" in done.stdout


@pytest.mark.skipif(
    not (ROOT / ".cache/sglang-0.5.10.post1-py3-none-any.whl").exists(),
    reason="test_upstream.py fetches upstream's wheel",
)
def test_ours_and_upstreams_linear_reach_the_stubs():
    """bench_mxfp8_host_overhead.py, which replaces FlashInfer's functions."""
    program = (
        "import bench_mxfp8_host_overhead as host; host.CALLS = 1; host.ROUNDS = 2"
    )
    program += "; print(*host.report(), sep='\\n')"
    done = run(sys.executable, "-c", program, PYTHONPATH=str(FOLDER))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| flashinfer_") == 8
