"""The kernel benchmarks without a GPU: FlashInfer's kernels are emulated, or stubs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmark/kernels/quantization/bench_mxfp8_linear.py"
sys.path.append(str(SCRIPT.parent))

import bench_mxfp8_host_overhead as host
import bench_mxfp8_linear as bench
import bench_mxfp8_weight_prep as prep
import mxfp8_timing as timing

pytestmark = pytest.mark.skipif(timing.HAS_GPU, reason="the rehearsal is for a CPU")


def run(*arguments, command=(SCRIPT,), **environment):
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def contenders():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_MXFP8_EMULATION", "1")
        found, left_out = bench.find_contenders()
        assert set(left_out) == {"triton"}
        yield found


def test_a_rehearsal_measures_everything_and_keeps_what_exists(tmp_path):
    output = tmp_path / "kernels.jsonl"
    arguments = ("--shapes", "256,512", "160,256", "--m", "3", "1", "--rehearse")
    done = run(*arguments, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {(row["part"], row["contender"], row["m"], row["n"]) for row in rows}
    parts = {name: ("linear", "quantize", "gemm") for name in bench.CONTENDERS}
    parts = {**parts, "bf16 torch": ("linear",), "triton": ()}
    assert found == {
        (part, name, m, n)
        for name, of_it in parts.items()
        for part in of_it
        for m in (1, 3)
        for n in (256, 160)
        if not (n == 160 and "8x4" in name.split())
    }
    assert all(len(row["us"]) == 3 and min(row["us"]) > 0 for row in rows)
    assert timing.REHEARSAL in done.stdout
    assert "- triton: RuntimeError: it needs an SM100 or SM103 GPU" in done.stdout
    assert "- flashinfer_trtllm 8x4 [160, 256]: N = 160" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == len(rows) + 2 * 2
    before = output.read_text()
    again = run("--rehearse", "--output", output)
    assert again.returncode == 2 and f"{output} exists" in again.stderr
    assert output.read_text() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--rehearse emulates it"),
        (("--rehearse", "--shapes", "256,500"), "K is not a multiple of 32"),
        (("--rehearse", "--shapes", "256"), "invalid shape value: '256'"),
        (("--rehearse", "--m", "0"), "invalid positive value"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    output = ["--output", str(tmp_path / "kernels.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, *output])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_sglang_and_venv_the_rest_is_measured(tmp_path):
    """As on a GPU machine with torch and Triton of its own."""
    packages, checkout = tmp_path / "packages", tmp_path / "checkout"
    packages.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("sglang", "__")):
            (packages / entry.name).symlink_to(entry)
    for folder in "benchmark/kernels", "python", "scripts":
        shutil.copytree(ROOT / folder, checkout / folder)
    script = checkout / SCRIPT.relative_to(ROOT)
    command = (sys.executable, "-S", script)  # no packages but those named here
    arguments = ("--rehearse", "--output", tmp_path / "kernels.jsonl")
    done = run(*arguments, command=command, PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stderr
    assert "| 16 | linear | bf16 torch | " in done.stdout
    assert done.stdout.count("sglang is not installed") == len(bench.CONTENDERS) - 1
    done = run(*arguments, command=command, PYTHONPATH="")
    assert done.returncode == 2
    assert done.stderr == "bench_mxfp8_linear.py: run ./scripts/setup.sh first\n"


@pytest.mark.parametrize("m", (1, 8, 9, 130))
def test_the_parts_are_the_linear_and_their_bytes_the_tensors(contenders, m):
    operands = timing.rotated_operands(256, 512, m)
    for name, contender in contenders.items():
        input, *weights = contender.prepare(*operands[0])
        whole = contender.linear(input, *weights)
        assert whole.shape == (m, 256)
        works = dict(bench.parts(contender, operands))
        size = lambda *tensors: sum(tensor.nbytes for tensor in tensors)
        assert works["linear"].bytes == size(input, *weights, whole)
        assert works["linear"].calls == len(operands) == 2
        if contender.gemm:
            quantized = contender.quantize(input)
            assert torch.equal(whole, contender.gemm(*quantized, *weights)), name
            assert works["quantize"].bytes == size(input, *quantized)
            assert works["gemm"].bytes == size(*quantized, *weights, whole)


def test_a_contender_that_fails_is_named_and_the_others_go_on(contenders):
    def broken(*arguments):
        raise RuntimeError("no such kernel\nand a trace")

    cutlass = contenders["flashinfer_cutlass 128x4"]
    both, failed = {"bad": cutlass._replace(gemm=broken), "good": cutlass}, {}
    rows = bench.measure_shape(both, 256, 512, 1, failed)
    assert failed == {"bad, M=1, N=256, K=512": "RuntimeError: no such kernel"}
    assert [r["part"] for r in rows if r["contender"] == "good"] == [
        *("linear", "quantize", "gemm")
    ]


def test_medians_and_floors(monkeypatch):
    ticks = iter([0.0, 5.0, 5.0, 6.0, 6.0, 9.0])  # 5, 1 and 3 seconds
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    work = timing.Work(lambda: None, calls=2)
    assert timing.medians({"a": work}, 3) == {"a": 1.5e6}
    speeds = {"read": 2e9, "copy": 4e9}
    monkeypatch.setattr(timing, "plain_speeds", lambda: speeds)
    assert timing.floor_us(8000) == pytest.approx(2.0)
    row = dict(part="gemm", contender="it", m=1, n=2, k=3, us=[3.0, 1, 2], bytes=4000)
    assert bench.table_row(row).startswith(
        "| 1 | gemm | it | 2.00 (1.00..3.00) | 1.00 (50%)"
    )


def test_the_default_shapes_are_the_readmes():
    shapes = bench.default_shapes()
    assert shapes[(24576, 4096)] == "Qwen3-8B gate_up_proj, TP 1"
    assert {(6144, 4096), (768, 4096), (1280, 8192), (8192, 3584)} < set(shapes)
    assert len(shapes) == 8


@pytest.mark.parametrize("broken", [None, "shuffle_rows_", "unswizzle_scale_"])
def test_weight_preparation_is_compared_with_the_formulas(monkeypatch, broken):
    monkeypatch.setattr(prep, "temporary_bytes", lambda run: run() or 0)
    functions = {name: getattr(prep.layout, name) for name in dir(prep.layout)}
    if broken:
        functions[broken] = lambda *arguments: None
    monkeypatch.setattr(prep, "layout", SimpleNamespace(**functions))
    if not broken:
        assert prep.check(prep.Linear(96, 160)) == 0
        return
    with pytest.raises(AssertionError, match=r"weight \[96, 160\]: right: "):
        prep.check(prep.Linear(96, 160))


def test_host_time_is_of_calls_that_reach_the_kernels(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 2)
    stubs = host.Stubs()

    def linear(input, weight, weight_scale, input_scale, bias):
        stubs.mxfp8_quantize(input)
        output = stubs.mm_mxfp8(input, weight, None, weight_scale)
        return output.view(*input.shape[:-1], host.N)

    assert host.seconds_per_call(linear, stubs, (2, 3, host.K), False) > 0
    with pytest.raises(AssertionError, match="0 calls"):
        no_kernels = lambda input, **others: input
        host.seconds_per_call(no_kernels, stubs, (2, host.K), True)


@pytest.mark.parametrize("ours, status", [(0.4, 0), (0.6, 1)])
def test_a_ratio_over_the_target_is_not_met(monkeypatch, capsys, ours, status):
    seconds = {"ours": ours, "upstream": 1.0}
    run_side = lambda side: ["0.0", [seconds[side]] * len(host.CASES)]
    monkeypatch.setattr(host, "run_side", run_side)
    monkeypatch.setattr(host, "UPSTREAM_DIR", ROOT)
    monkeypatch.setattr(sys, "argv", ["host", "--check"])
    assert host.main() == status
    met = "NOT met" if status else "met"
    assert f"{ours:.2f} at most, {met}" in capsys.readouterr().out


def test_ours_is_timed_in_a_process_of_its_own(monkeypatch):
    version, seconds = host.run_side("ours")
    assert "mxfp8" in version and len(seconds) == len(host.CASES)
