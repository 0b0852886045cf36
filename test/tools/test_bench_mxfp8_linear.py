"""The kernel benchmarks without a GPU: FlashInfer's kernels are emulated, or stubs."""

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmark/kernels/quantization"
sys.path.append(str(FOLDER))

import bench_mxfp8_linear as bench
import bench_mxfp8_weight_prep as prep
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


@pytest.mark.parametrize(
    "script", ["bench_mxfp8_host_overhead", "bench_mxfp8_linear", "tune_mxfp8_layout"]
)
def test_without_sglang_there_is_one_line(script, tmp_path):
    """As where torch is, and neither the patched sglang nor .venv."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("sglang", "__")):
            (packages / entry.name).symlink_to(entry)
    folder = shutil.copytree(FOLDER, tmp_path / "benchmark/kernels/quantization")
    (tmp_path / "python").symlink_to(ROOT / "python")
    command = [sys.executable, "-S", folder / f"{script}.py", "--rehearse"]
    done = run(*command, PYTHONPATH=str(packages))
    assert done.returncode == 1
    assert done.stderr == f"{script}.py: the patched sglang is not installed\n"


@pytest.mark.parametrize("m", (1, 9, 130))
@pytest.mark.parametrize("name", bench.FLASHINFER)
def test_the_halves_are_the_linear_and_their_bytes_the_tensors(monkeypatch, name, m):
    monkeypatch.setenv("SGLANG_MXFP8_EMULATION", "1")
    operands = timing.rotated_operands(256, 512, m)
    linear, quantize, gemm = bench.flashinfer(name)
    input, *weights = operands[0]
    quantized = quantize(input)
    whole = linear(input, *weights)
    assert whole.shape == (m, 256) and torch.equal(whole, gemm(*quantized, *weights))
    size = lambda *tensors: sum(tensor.nbytes for tensor in tensors)
    works = bench.parts(name, operands)
    assert works["linear"].bytes == size(input, *weights, whole)
    assert works["quantize"].bytes == size(input, *quantized)
    assert works["gemm"].bytes == size(*quantized, *weights, whole)
    assert {work.calls for work in works.values()} == {len(operands)}


@pytest.mark.parametrize("broken", [None, "shuffle_rows_", "unswizzle_scale_"])
def test_weight_preparation_is_checked(monkeypatch, broken):
    monkeypatch.setattr(prep, "temporary_bytes", lambda run: run() or 0)
    functions = {name: getattr(prep.layout, name) for name in dir(prep.layout)}
    if broken:
        functions[broken] = lambda *arguments: None
    monkeypatch.setattr(prep, "layout", SimpleNamespace(**functions))
    if not broken:
        assert prep.check(prep.Linear(96, 160)) == 0
        return
    with pytest.raises(AssertionError, match=r"weight \[96, 160\]: other bytes"):
        prep.check(prep.Linear(96, 160))


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
