#!/usr/bin/env python3
"""Time of an MXFP8 linear, quantization included, per backend, scale layout and shape.

Median of the repetitions, each a CUDA graph of calls on operands in turn, out of the L2
cache. GB/s counts the input, the output, and the weight with its scale. The last column is
the time of the bf16 linear by this one's. Without triton_kernels, Triton's quantizer is
plain torch, as in a server.

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
from collections.abc import Iterator

import mxfp8_timing as timing

NAMES = timing.BF16, timing.WEIGHT_ONLY, *timing.FLASHINFER, timing.TRITON
SHAPES = {  # as sglang fuses the linears
    (6144, 4096): "Qwen3-8B qkv_proj, TP 1",
    (24576, 4096): "Qwen3-8B gate_up_proj, TP 1",
    (768, 4096): "Qwen3-8B qkv_proj, TP 8",
    (3072, 4096): "Qwen3-8B gate_up_proj, TP 8",
    (57344, 8192): "Llama-3-70B gate_up_proj, TP 1",
    (8192, 28672): "Llama-3-70B down_proj, TP 1",
    (1280, 8192): "Llama-3-70B qkv_proj, TP 8",
    (8192, 3584): "Llama-3-70B down_proj, TP 8",
}
TITLES = "M", "linear", "median us (min..max)", "GB/s", "TFLOP/s", "bf16 / this"


def rows(names: list[str], n: int, k: int, m: int, failed: list) -> Iterator[str]:
    """A row for each name; `failed` gets a line for each that fails."""
    operands, works = timing.operands(n, k, m), {}
    for name in names:
        try:
            works[name] = timing.calls(name, operands)
            works[name][0]()
        except Exception as error:  # FlashInfer, Triton and torch have their own
            what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            failed.append(f"- {name}, M={m}, N={n}, K={k}: {what}")
            works.pop(name, None)
    taken = timing.measure(works, 50 if timing.HAS_GPU else 3)
    bf16 = statistics.median(taken.get(timing.BF16, [float("nan")]))
    for name, us in taken.items():
        median = statistics.median(us)
        weight = n * k * 2 if name == timing.BF16 else n * k * 33 // 32
        moved, operations = weight + 2 * m * (n + k), 2 * m * n * k
        spread = f"{median:.2f} ({min(us):.2f}..{max(us):.2f})"
        speeds = f"{moved / median / 1e3:.4g}", f"{operations / median / 1e6:.4g}"
        yield timing.row(m, name, spread, *speeds, f"{bf16 / median:.2f}")


def report(shapes: dict[timing.Shape, str], ms: list[int]) -> Iterator[str]:
    left_out, failed = [], []
    yield f"# MXFP8 linears\n\n{timing.environment()}\n"
    yield __doc__.split("\n\n")[1]
    for (n, k), title in shapes.items():
        yield f"\n### {title} [{n}, {k}]\n\n{timing.head(*TITLES)}"
        refusals = {name: timing.refusal(name, n, k) for name in NAMES}
        left_out += [f"- {x} [{n}, {k}]: {why}" for x, why in refusals.items() if why]
        fitting = [name for name, why in refusals.items() if not why]
        for m in ms:
            yield from rows(fitting, n, k, m, failed)
    for title, lines in ("Left out", left_out), ("Failed", failed):
        yield "\n".join([f"\n## {title}\n", *lines]) if lines else ""
    if failed:
        sys.exit(1)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shapes", nargs="+", type=timing.shape, metavar="N,K")
    parser.add_argument("--m", nargs="+", type=int, metavar="M")
    args = timing.parse_arguments(parser)
    shapes = {(256, 512): "tiny"} if args.rehearse else SHAPES
    shapes = dict.fromkeys(args.shapes, "") if args.shapes else shapes
    ms = args.m or ([1, 16] if args.rehearse else timing.DEFAULT_M)
    for line in report(shapes, sorted({*ms})):
        print(line, flush=True)


if __name__ == "__main__":
    main()
