"""bench_mxfp8_linear.py: what it times, the rows it writes, and what it leaves out.

Without a GPU: what FlashInfer's kernels would be is emulated.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evidence import Kernel, read_lines

SCRIPTS = Path(__file__).parents[2] / "benchmark/kernels/quantization"
sys.path.append(str(SCRIPTS))

import bench_mxfp8_linear as bench
from mxfp8_timing import random_operands

FLASHINFER = {
    ("flashinfer_trtllm", "8x4"),
    ("flashinfer_trtllm", "128x4"),
    ("flashinfer_cutlass", "128x4"),
}
PARTS = {"quantize", "gemm", "linear"}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the rehearsal is for a CPU"
)


def run_script(*arguments, python=(sys.executable,), **environment):
    environment = {**os.environ, **environment}
    command = [*python, SCRIPTS / "bench_mxfp8_linear.py", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def candidates():
    found, reasons = bench.find_candidates(rehearsal=True)
    assert set(reasons) == {"triton"}
    return found


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "kernels.jsonl"
    arguments = ("--shapes", "256,512", "160,256", "--m", "3", "1", "--rehearse")
    done = run_script(*arguments, "--output", output)
    assert done.returncode == 0, done.stderr
    return done.stdout, output


def test_rows_are_of_the_schema_and_cover_everything(rehearsal):
    _, output = rehearsal
    rows = read_lines(Kernel, output)
    assert all(row.rehearsal and row.device == "cpu" for row in rows)
    assert all(len(row.us) == bench.REHEARSAL_REPEATS for row in rows)
    for m in (1, 3):
        found = {
            (row.part, row.backend, row.layout)
            for row in rows
            if (row.m, row.n, row.k) == (m, 256, 512)
        }
        expected = {(part, *kernel) for part in PARTS for kernel in FLASHINFER}
        assert found == expected | {("bf16_gemm", "torch", None)}
    assert [row.part for row in rows[:2]] == ["copy", "bf16_gemm"]


def test_a_rehearsal_says_so_and_names_what_is_left_out(rehearsal):
    text, _ = rehearsal
    assert text.startswith(bench.REHEARSAL)
    left_out = text[text.index("## Left out") :]
    assert "- triton: it needs an SM100 or SM103 GPU" in left_out
    assert "- flashinfer_trtllm 8x4 [160, 256]: N = 160" in left_out
    assert "CUDA graph" not in text


def test_tables_are_whole(rehearsal):
    text, output = rehearsal
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    tables = text.count("### ")
    assert len(lines) == len(read_lines(Kernel, output)) + 2 * tables


def test_what_exists_is_kept(rehearsal):
    _, output = rehearsal
    before = output.read_text()
    done = run_script("--rehearse", "--output", output)
    assert done.returncode == 2
    assert f"{output} exists" in done.stderr
    assert output.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((), "--rehearse runs the steps on the CPU"),
        (("--rehearse", "--shapes", "256,500"), "K = 500 is not a multiple of 32"),
        (("--rehearse", "--shapes", "256"), "'256' is no shape: N,K"),
        (("--rehearse", "--m", "0"), "invalid positive value"),
    ),
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    output = ["--output", str(tmp_path / "kernels.jsonl")]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, *output])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_sglang_the_rest_is_measured(tmp_path):
    """As on a GPU machine where only torch, Triton and FlashInfer are at hand."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("sglang", "__")):
            (packages / entry.name).symlink_to(entry)
    output = tmp_path / "kernels.jsonl"
    done = run_script(
        *("--rehearse", "--output", output),
        python=(sys.executable, "-S"),  # none but the packages named here
        PYTHONPATH=str(packages),
    )
    assert done.returncode == 0, done.stderr
    assert "triton: the patched sglang is not installed" in done.stdout
    rows = read_lines(Kernel, output)
    assert {row.part for row in rows} == {"copy", "bf16_gemm"}
    assert len(rows) == 2 + len(bench.REHEARSAL_M)


@pytest.mark.parametrize("m", (1, 8, 9, 130))
def test_quantization_and_gemm_are_the_linear(candidates, m):
    input, weight, scale = random_operands(256, 512, m, "cpu")
    for candidate in candidates:
        whole = candidate.linear(input, weight, scale)
        parts = candidate.gemm(*candidate.quantize(input), weight, scale)
        assert whole.shape == (m, 256)
        assert torch.equal(whole, parts), candidate


@pytest.mark.parametrize("m", (1, 130))
def test_bytes_are_those_of_the_tensors(candidates, m):
    operands = [random_operands(256, 512, m, "cpu")]
    input, weight, scale = operands[0]
    for candidate in candidates:
        work = {
            part.part: prepare()
            for part, prepare in bench.candidate_work(candidate, operands, [input])
        }
        quantized = sum(tensor.nbytes for tensor in candidate.quantize(input))
        output = candidate.linear(input, weight, scale).nbytes
        weights = weight.nbytes + scale.nbytes
        assert work["quantize"].bytes == input.nbytes + quantized
        assert work["gemm"].bytes == quantized + weights + output
        assert work["linear"].bytes == input.nbytes + weights + output
        assert work["gemm"].flops == work["linear"].flops == 2 * m * 256 * 512


def test_every_call_of_a_run_is_counted(candidates):
    operands = [random_operands(256, 512, 2, "cpu") for _ in range(3)]
    calls = []
    counted = dataclasses.replace(
        candidates[0], linear=lambda *arguments: calls.append(arguments)
    )
    *_, (_, prepare) = bench.candidate_work(counted, operands, [])
    work = prepare()
    work.run()
    assert work.calls == len(calls) == 3
    assert len({call[1].data_ptr() for call in calls}) == 3


def test_rates():
    row = bench.Row(
        *("gemm", "triton", None, 1, 2, 3, [3.0, 1.0, 2.0], 4_000_000, 6_000_000),
        *("cpu", True),
    )
    assert row.median == 2.0
    assert row.gigabytes_per_second == pytest.approx(2000)  # 4 MB in 2 us
    assert row.teraflops == pytest.approx(3)  # 6 MFLOP in 2 us
    line = bench.table_rows([row], (4000, 12))
    assert line == ("| 1 | gemm, triton | 2.00 (1.00..3.00) | 2000 | 50% | 3 | 25% |")


def test_a_part_that_fails_is_named_and_the_others_go_on(candidates, tmp_path):
    def broken(*arguments):
        raise RuntimeError("no such kernel\nand a trace")

    one = dataclasses.replace(candidates[0], gemm=broken)
    measured = bench.Bench(tmp_path / "kernels.jsonl", rehearsal=True)
    measured.shape(256, 512, 1, [one])
    name = "gemm, flashinfer_trtllm 8x4, M=1, N=256, K=512"
    assert measured.failed == {name: "RuntimeError: no such kernel"}
    assert {row.part for row in measured.rows} == {"bf16_gemm", "quantize", "linear"}
    written = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert [json.loads(line)["part"] for line in written] == [
        row.part for row in measured.rows
    ]
    text = bench.report(measured, {}, {})
    assert f"## Failed\n- {name}: RuntimeError: no such kernel" in text


def test_the_default_shapes_are_the_readmes():
    shapes = bench.default_shapes()
    assert shapes[(24576, 4096)] == "Qwen3-8B gate_up_proj, TP 1"
    assert {(6144, 4096), (768, 4096), (1280, 8192), (8192, 3584)} < set(shapes)
    assert len(shapes) == len(bench.MODEL_SHAPES)
