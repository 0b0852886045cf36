#!/usr/bin/env python3
"""Time of an MXFP8 linear and of its parts, per backend, scale layout and shape.

Beside each time stands the floor: the least bytes that a call must move, over the speed
of a plain read or copy. Needs a CUDA GPU; what cannot run there is named with its reason.
--rehearse runs the same steps on a CPU, emulated, and measures nothing of use.

    ./benchmark/kernels/quantization/bench_mxfp8_linear.py --output kernels.jsonl
    ./benchmark/kernels/quantization/bench_mxfp8_linear.py \\
        --shapes 2560,8192 8192,4096 --m 1 64 4096 --output kernels.jsonl
    ./benchmark/kernels/quantization/bench_mxfp8_linear.py --rehearse --output FILE
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mxfp8_timing as timing
import torch

# README's shapes: those of its routing table and of its weight preparation.
MODEL_SHAPES = {
    "Qwen3-8B": {1: ("qkv_proj", "gate_up_proj"), 8: ("qkv_proj", "gate_up_proj")},
    "Llama-3-70B": {1: ("gate_up_proj", "down_proj"), 8: ("qkv_proj", "down_proj")},
}
METHOD = (
    "Median of the repetitions, each a CUDA graph of calls on operands in turn, out of the "
    "L2 cache. The floor is the least bytes that a call must move, over the faster of a "
    "plain read and a plain copy. Without triton_kernels, Triton's quantizer is plain "
    "torch, as in a server."
)


class Contender(NamedTuple):
    """A way to compute bf16 [M, K] @ [N, K].T.

    Attributes:
        linear: (input, weight, weight_scale) to bf16 [M, N].
        quantize: input to values and scale; None where it is no step of its own.
        gemm: (values, scale, weight, weight_scale) to bf16 [M, N].
        refusal: (n, k) to why it cannot take such a layer, or "".
        prepare: (input, weight, weight_scale) to what it is called with instead.
    """

    linear: Callable
    quantize: Callable | None = None
    gemm: Callable | None = None
    refusal: Callable[[int, int], str] = lambda n, k: ""
    prepare: Callable = lambda *operands: operands


def bf16() -> Contender:
    """torch's product: cuBLAS on a GPU."""
    to_bf16 = lambda input, weight, scale: (input, weight.to(torch.bfloat16))
    return Contender(torch.nn.functional.linear, prepare=to_bf16)


def flashinfer(backend: str, layout: str) -> Contender:
    """FlashInfer's quantizer and GEMM, or their emulation in a rehearsal."""
    fp8_utils = kernels_of(backend)
    name, use_8x4 = backend.removeprefix("flashinfer_"), layout == "8x4"
    linear = fp8_utils.flashinfer_mxfp8_blockscaled_linear

    def gemm(values, scale, weight, weight_scale):
        room = fp8_utils.kernel_scale(weight_scale)
        arguments = values, weight.t(), scale, room, torch.bfloat16, use_8x4, name
        return fp8_utils.flashinfer_mm_mxfp8(*arguments)

    return Contender(
        partial(linear, backend=name, max_m_8x4=sys.maxsize if use_8x4 else 0),
        lambda input: fp8_utils.flashinfer_mxfp8_quantize(input, use_8x4),
        gemm,
        partial(refusal, backend, use_8x4),
    )


def triton() -> Contender:
    """Upstream's kernel; its GEMM packs both scales at each call, as in a server."""
    fp8_utils = kernels_of("triton")

    def gemm(values, scale, weight, weight_scale):
        dtype = torch.bfloat16
        return fp8_utils.triton_mxfp8_linear(values, weight, weight_scale, scale, dtype)

    linear = lambda input, *weights: gemm(input, None, *weights)
    quantize = fp8_utils.mxfp8_group_quantize
    return Contender(linear, quantize, gemm, partial(refusal, "triton", False))


# What is compared; one that cannot run here raises why as it is made.
CONTENDERS: dict[str, Callable[[], Contender]] = {
    "bf16 torch": bf16,
    "flashinfer_trtllm 8x4": partial(flashinfer, "flashinfer_trtllm", "8x4"),
    "flashinfer_trtllm 128x4": partial(flashinfer, "flashinfer_trtllm", "128x4"),
    "flashinfer_cutlass 128x4": partial(flashinfer, "flashinfer_cutlass", "128x4"),
    "triton": triton,
}


def kernels_of(backend: str):
    """sglang's module of functions; RuntimeError where `backend` does not run here."""
    if importlib.util.find_spec("sglang").origin is None:  # this checkout's folders
        raise RuntimeError("the patched sglang is not installed")
    from sglang.srt.layers.quantization import fp8_utils, routing

    wanted = routing.Mxfp8LinearBackend(backend)
    lacks = routing.mxfp8_kernels_missing(wanted)
    if lacks and (timing.HAS_GPU or not wanted.is_flashinfer()):
        raise RuntimeError(f"it needs {lacks}")
    return fp8_utils


def refusal(backend: str, use_8x4: bool, n: int, k: int) -> str:
    """Why `backend` does not take a bf16 layer [N, K], or ""."""
    from sglang.srt.layers.quantization.mxfp8 import routing

    # FlashInfer checks the weight's scale by the length of the 8x4 layout.
    if use_8x4 and n % 128:
        return f"N = {n} is not a multiple of 128 (8x4)"
    wanted = routing.Mxfp8LinearBackend(backend)
    options = routing.Mxfp8LinearOptions(wanted, available=(wanted,))
    select = routing.select_mxfp8_linear_backend
    choice = select(options, n, k, torch.bfloat16)
    return "" if choice.backend == wanted else choice.reason


def find_contenders() -> tuple[dict[str, Contender], dict[str, str]]:
    """What can be measured here, and why the rest cannot, by name."""
    found, left_out = {}, {}
    for name, make in CONTENDERS.items():
        try:
            found[name] = make()
        except (
            Exception
        ) as error:  # a CUDA library that does not load is no ImportError
            left_out[name] = first_line(error)
    return found, left_out


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def parts(
    contender: Contender, operands: Sequence
) -> Iterator[tuple[str, timing.Work]]:
    """The linear, and its halves where it has them, over the operands in turn."""
    operands = [contender.prepare(*each) for each in operands]
    input, *weights = operands[0]
    output = 2 * len(input) * len(weights[0])

    def work(function: Callable, calls: Sequence, *moved: torch.Tensor) -> timing.Work:
        nbytes = sum(tensor.nbytes for tensor in moved)
        if function != contender.quantize:
            nbytes += output
        return timing.Work(partial(timing.each, function, calls), len(calls), nbytes)

    yield "linear", work(contender.linear, operands, *operands[0])
    if contender.quantize is not None:
        inputs = [(input,) for input, *_ in operands]
        done = [contender.quantize(*each) for each in inputs]
        yield "quantize", work(contender.quantize, inputs, input, *done[0])
        calls = [(*values, *weights) for values, (_, *weights) in zip(done, operands)]
        yield "gemm", work(contender.gemm, calls, *calls[0])


def measure_shape(contenders: dict, n: int, k: int, m: int, failed: dict) -> list[dict]:
    """A row for each part of each contender; `failed` grows with what does not run."""
    operands = timing.rotated_operands(n, k, m)
    works = {}
    for name, contender in contenders.items():
        try:
            for part, work in parts(contender, operands):
                work.run()
                works[part, name] = work
        except Exception as error:  # FlashInfer, Triton and torch have their own
            failed[f"{name}, M={m}, N={n}, K={k}"] = first_line(error)
    taken = timing.measure(works, 50 if timing.HAS_GPU else 3)
    sizes = dict(m=m, n=n, k=k, device=timing.DEVICE)
    return [
        dict(part=part, contender=name, **sizes, us=us, bytes=works[part, name].bytes)
        for (part, name), us in taken.items()
    ]


def table_row(row: dict) -> str:
    us, flops = row["us"], 2 * row["m"] * row["n"] * row["k"]
    median, floor = statistics.median(us), timing.floor_us(row["bytes"])
    spread = f"{median:.2f} ({min(us):.2f}..{max(us):.2f})"
    speed = "-" if row["part"] == "quantize" else f"{flops / median / 1e6:.4g}"
    cells = row["m"], row["part"], row["contender"], spread
    return timing.row(*cells, f"{floor:.2f} ({floor / median:.0%})", speed)


def report(
    names: dict[timing.Shape, str], ms: list[int], output: Path
) -> Iterator[str]:
    """The lines of the report; `output` gets each row as JSON when it is measured."""
    contenders, left_out = find_contenders()
    failed: dict[str, str] = {}
    speeds = timing.plain_speeds().items()
    yield f"# MXFP8 linears\n\n{timing.environment()}\n\n{METHOD}\n"
    yield "; ".join(f"plain {name}: {speed / 1e9:.0f} GB/s" for name, speed in speeds)
    for (n, k), name in names.items():
        titles = (
            "M",
            "part",
            "of",
            "median us (min..max)",
            "floor us (share)",
            "TFLOP/s",
        )
        yield f"\n### {name} [{n}, {k}]\n\n{timing.head(*titles)}"
        refusals = {name: made.refusal(n, k) for name, made in contenders.items()}
        left_out |= {f"{c} [{n}, {k}]": why for c, why in refusals.items() if why}
        fitting = {c: made for c, made in contenders.items() if not refusals[c]}
        for m in ms:
            for row in measure_shape(fitting, n, k, m, failed):
                with output.open("a") as file:
                    print(json.dumps(row), file=file)
                yield table_row(row)
    for title, reasons in ("Left out", left_out), ("Failed", failed):
        lines = [f"- {what}: {why}" for what, why in reasons.items()]
        yield "\n".join([f"\n## {title}\n", *lines]) if lines else ""
    if failed:
        sys.exit(1)


def default_shapes() -> dict[timing.Shape, str]:
    return {
        timing.linears(model, tp)[linear]: f"{model} {linear}, TP {tp}"
        for model, names in MODEL_SHAPES.items()
        for tp in names
        for linear in names[tp]
    }


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", type=timing.shape, metavar="N,K")
    parser.add_argument("--m", nargs="+", type=timing.positive, metavar="M")
    parser.add_argument("--output", type=Path, required=True, help="JSONL, a new file")
    args = timing.rehearsable(parser)
    if args.output.exists():
        parser.error(f"{args.output} exists: name another file, so that it is kept")
    names, ms = default_shapes(), timing.DEFAULT_M
    if args.rehearse:
        names, ms = {(256, 512): "tiny"}, [1, 16]
    names = dict.fromkeys(args.shapes, "") if args.shapes else names
    timing.report(report(names, sorted({*(args.m or ms)}), args.output))


if __name__ == "__main__":
    main()
