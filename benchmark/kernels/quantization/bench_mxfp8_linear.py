#!/usr/bin/env python3
"""Time of an MXFP8 linear and of its parts, per backend, scale layout and shape.

Median of the repetitions, each a CUDA graph of calls on operands in turn, out of the L2
cache. GB/s counts the least bytes that a call must move; beside them stands a plain copy of
the bf16 weight. The last column is bf16's time of the same linear by this one's. Without
triton_kernels, Triton's quantizer is plain torch, as in a server.

Needs a CUDA GPU and .venv (./scripts/setup.sh); what cannot run on that GPU is named with
its reason. --rehearse runs the same steps on a CPU, emulated, and measures nothing of use.

    ./benchmark/kernels/quantization/bench_mxfp8_linear.py | tee linears.md
    ./benchmark/kernels/quantization/bench_mxfp8_linear.py \\
        --shapes 2560,8192 8192,4096 --m 1 64 4096
    ./benchmark/kernels/quantization/bench_mxfp8_linear.py --rehearse
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mxfp8_timing as timing
import torch

from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import routing, weight_only

BF16, TRITON, WEIGHT_ONLY = "bf16 torch", "triton", "weight_only"
FLASHINFER = (
    "flashinfer_trtllm 128x4",
    "flashinfer_trtllm 8x4",
    "flashinfer_cutlass 128x4",
)
NAMES = BF16, WEIGHT_ONLY, *FLASHINFER, TRITON


def refusal(name: str, n: int, k: int) -> str:
    """Why `name` cannot compute a bf16 layer [N, K] here, or ""."""
    if name == BF16:
        return ""
    backend, _, layout = name.partition(" ")
    wanted = routing.Mxfp8LinearBackend(backend)
    lacks = routing.mxfp8_kernels_missing(wanted)
    if lacks and (timing.HAS_GPU or not wanted.is_flashinfer()):
        return f"it needs {lacks}"
    # FlashInfer checks the weight's scale by the length of the 8x4 layout.
    if layout == "8x4" and n % 128:
        return f"N = {n} is not a multiple of 128 (8x4)"
    options = routing.Mxfp8LinearOptions(wanted, available=(wanted,))
    select = routing.select_mxfp8_linear_backend
    choice = select(options, n, k, torch.bfloat16)
    return "" if choice.backend == wanted else choice.reason


def flashinfer(name: str) -> tuple[Callable, Callable, Callable]:
    """FlashInfer's linear, quantizer and GEMM, or their emulation in a rehearsal."""
    backend = name.split()[0].removeprefix("flashinfer_")
    use_8x4 = name.endswith(" 8x4")
    linear = fp8_utils.flashinfer_mxfp8_blockscaled_linear

    def quantize(input):
        return fp8_utils.flashinfer_mxfp8_quantize(input, use_8x4)

    def gemm(values, scale, weight, weight_scale):
        room = fp8_utils.kernel_scale(weight_scale)
        arguments = values, weight.t(), scale, room, torch.bfloat16, use_8x4, backend
        return fp8_utils.flashinfer_mm_mxfp8(*arguments)

    max_m_8x4 = sys.maxsize if use_8x4 else 0
    return partial(linear, backend=backend, max_m_8x4=max_m_8x4), quantize, gemm


def triton() -> tuple[Callable, Callable, Callable]:
    """Upstream's kernel; its GEMM packs both scales at each call, as in a server."""

    def gemm(values, scale, weight, weight_scale):
        arguments = values, weight, weight_scale, scale, torch.bfloat16
        return fp8_utils.triton_mxfp8_linear(*arguments)

    linear = lambda input, *weights: gemm(input, None, *weights)
    return linear, fp8_utils.mxfp8_group_quantize, gemm


def work(function: Callable, calls: Sequence[Sequence[torch.Tensor]]) -> timing.Work:
    """The calls in turn; each moves at least its arguments and its results."""
    results = function(*calls[0])
    results = results if isinstance(results, tuple) else (results,)
    moved = sum(tensor.nbytes for tensor in (*calls[0], *results))
    return timing.Work(partial(timing.each, function, calls), len(calls), moved)


def parts(name: str, operands: Sequence) -> dict[str, timing.Work]:
    """The linear, and its halves where it has them, over the operands in turn."""
    if name == BF16:  # cuBLAS on a GPU
        calls = [(input, weight.to(torch.bfloat16)) for input, weight, _ in operands]
        linear, copied = torch.nn.functional.linear, [call[1:] for call in calls]
        return {"linear": work(linear, calls), "copy": work(torch.clone, copied)}
    if name == WEIGHT_ONLY:
        max_m = weight_only.max_m_fused(*operands[0][1].shape)
        linear = partial(weight_only.weight_only_linear, max_m_fused=max_m)
        return {"linear": work(linear, operands)}
    linear, quantize, gemm = triton() if name == TRITON else flashinfer(name)
    quantized = [(*quantize(input), *weights) for input, *weights in operands]
    return {
        "linear": work(linear, operands),
        "quantize": work(quantize, [operand[:1] for operand in operands]),
        "gemm": work(gemm, quantized),
    }


def table_row(m: int, n: int, k: int, key: tuple, us: list, nbytes: int, bf16: float):
    name, part = key
    median = statistics.median(us)
    spread = f"{median:.2f} ({min(us):.2f}..{max(us):.2f})"
    is_product = part in ("linear", "gemm")
    speed = f"{2 * m * n * k / median / 1e6:.4g}" if is_product else "-"
    ratio = f"{bf16 / median:.2f}" if part == "linear" else "-"
    bandwidth = f"{nbytes / median / 1e3:.4g}"
    return timing.row(m, part, name, spread, bandwidth, speed, ratio)


def measured(names: list[str], n: int, k: int, m: int, failed: list) -> Iterator[str]:
    """A row for each part of each name; `failed` gets a line for each that fails."""
    operands = timing.rotated_operands(n, k, m)
    works = {}
    for name in names:
        try:
            for part, made in parts(name, operands).items():
                works[name, part] = made
        except Exception as error:  # FlashInfer, Triton and torch have their own
            what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            failed.append(f"- {name}, M={m}, N={n}, K={k}: {what}")
    taken = timing.measure(works, 50 if timing.HAS_GPU else 3)
    bf16 = statistics.median(taken.get((BF16, "linear"), [float("nan")]))
    for key, us in taken.items():
        yield table_row(m, n, k, key, us, works[key].bytes, bf16)


def report(names: dict[timing.Shape, str], ms: list[int]) -> Iterator[str]:
    left_out, failed = [], []
    yield f"# MXFP8 linears\n\n{timing.environment()}\n"
    yield __doc__.split("\n\n")[1]
    titles = "M", "part", "of", "median us (min..max)", "GB/s", "TFLOP/s", "bf16 / this"
    for (n, k), title in names.items():
        yield f"\n### {title} [{n}, {k}]\n\n{timing.head(*titles)}"
        refusals = {name: refusal(name, n, k) for name in NAMES}
        left_out += [f"- {x} [{n}, {k}]: {why}" for x, why in refusals.items() if why]
        fitting = [name for name, why in refusals.items() if not why]
        for m in ms:
            yield from measured(fitting, n, k, m, failed)
    for title, lines in ("Left out", left_out), ("Failed", failed):
        yield "\n".join([f"\n## {title}\n", *lines]) if lines else ""
    if failed:
        sys.exit(1)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shapes", nargs="+", type=timing.shape, metavar="N,K")
    parser.add_argument("--m", nargs="+", type=int, metavar="M")
    args = timing.rehearsable(parser)
    names, ms = timing.SHAPES, timing.DEFAULT_M
    if args.rehearse:
        names, ms = {(256, 512): "tiny"}, [1, 16]
    names = dict.fromkeys(args.shapes, "") if args.shapes else names
    for line in report(names, sorted({*(args.m or ms)})):
        print(line, flush=True)


if __name__ == "__main__":
    main()
