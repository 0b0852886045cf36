"""Time of an MXFP8 linear and of its parts, per backend, scale layout and shape.

Quantization, GEMM and the whole linear, through the functions that the server calls,
beside what this device reaches with a plain copy and with bf16 products: CUDA graphs,
weights out of the L2 cache. Every repetition is kept. Runs on any CUDA GPU; what cannot
run there is named with its reason, and sglang need not be installed for the rest.
--rehearse runs the same steps on a CPU, emulated, and measures nothing of use.

    python benchmark/kernels/quantization/bench_mxfp8_linear.py --output kernels.jsonl
    python benchmark/kernels/quantization/bench_mxfp8_linear.py \\
        --shapes 2560,8192 8192,4096 --m 1 64 4096 --output kernels.jsonl
    python benchmark/kernels/quantization/bench_mxfp8_linear.py --rehearse --output FILE
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bench_mxfp8_weight_prep import MODELS, driver_version
from mxfp8_timing import (
    DEFAULT_M,
    Operands,
    captured,
    interleaved_seconds,
    positive,
    rotated_operands,
    rotation,
)
from tqdm import tqdm

from sglang.srt.layers.quantization.mxfp8_layout import (
    GROUP_SIZE,
    swizzled_scale_numel,
)

# README's shapes: those of its routing table and of its weight preparation.
MODEL_SHAPES = (
    *(("Qwen3-8B", tp, "qkv_proj") for tp in (1, 8)),
    *(("Qwen3-8B", tp, "gate_up_proj") for tp in (1, 8)),
    ("Llama-3-70B", 8, "qkv_proj"),
    ("Llama-3-70B", 1, "gate_up_proj"),
    *(("Llama-3-70B", tp, "down_proj") for tp in (1, 8)),
)
REHEARSAL_SHAPES, REHEARSAL_M = {(256, 512): "tiny"}, [1, 16]
REPEATS, REHEARSAL_REPEATS = 50, 3
COPY_BYTES, SQUARE = 1 << 30, 8192
REHEARSAL_COPY_BYTES, REHEARSAL_SQUARE = 1 << 20, 128
MAX_QUANTIZED = 256  # inputs in turn: fewer than 2x L2 of them for a small M
REHEARSAL = "REHEARSAL: CPU, kernels emulated; says nothing about speed"

Shape = tuple[int, int]  # (N, K) of one rank's weight
Reasons = dict[str, str]  # why something was not measured


class Part(NamedTuple):
    """What a row measures; the columns of its table that say what, not how fast."""

    part: str
    backend: str
    layout: str | None = None

    def __str__(self) -> str:
        backend = f"{self.backend} {self.layout or ''}".rstrip()
        return f"{self.part.replace('_', ' ')}, {backend}"


@dataclass(frozen=True)
class Row:
    """A line of the output.

    Attributes:
        us: microseconds of one call, each a repetition's mean over its operands.
        bytes: the least that a call must read and write.
        flops: floating-point operations of a call, 2 * M * N * K.
        m: 1 for a copy, which has no n and no k.
    """

    part: str
    backend: str
    layout: str | None
    m: int
    n: int | None
    k: int | None
    us: list[float]
    bytes: int | None
    flops: int | None
    device: str
    rehearsal: bool

    @property
    def key(self) -> Part:
        return Part(self.part, self.backend, self.layout)

    @property
    def median(self) -> float:
        return statistics.median(self.us)

    @property
    def gigabytes_per_second(self) -> float | None:
        return None if self.bytes is None else self.bytes / self.median / 1e3

    @property
    def teraflops(self) -> float | None:
        return None if self.flops is None else self.flops / self.median / 1e6


class Work(NamedTuple):
    """`run` makes `calls` calls, each of which moves `bytes` and computes `flops`."""

    run: Callable[[], object]
    calls: int
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A backend with an activation-scale layout, by its functions.

    Attributes:
        quantize: bf16 [M, K] to what `gemm` takes of it: values and scale.
        gemm: (values, scale, weight, weight_scale) to bf16 [M, N].
        linear: (input, weight, weight_scale) to bf16 [M, N].
        refusal: (n, k) to why the backend cannot take such a layer, or "".
    """

    backend: str
    layout: str | None
    quantize: Callable
    gemm: Callable
    linear: Callable
    refusal: Callable[[int, int], str]


def flashinfer_candidate(fp8_utils, backend: str, layout: str) -> Candidate:
    """FlashInfer's quantizer and GEMM, or their emulation where they are missing."""
    name, use_8x4 = backend.removeprefix("flashinfer_"), layout == "8x4"
    up_to = sys.maxsize if use_8x4 else 0

    def gemm(values, scale, weight, weight_scale):
        room = fp8_utils.kernel_scale(weight_scale)
        return fp8_utils.flashinfer_mm_mxfp8(
            *(values, weight.t(), scale, room, torch.bfloat16, use_8x4, name)
        )

    def refusal(n: int, k: int) -> str:
        # FlashInfer checks the weight's scale by the length of the 8x4 layout.
        if use_8x4 and n % 128:
            return f"N = {n} is not a multiple of 128 (8x4)"
        return backend_refusal(backend, n, k)

    return Candidate(
        backend,
        layout,
        lambda x: fp8_utils.flashinfer_mxfp8_quantize(x, use_8x4),
        gemm,
        partial(
            fp8_utils.flashinfer_mxfp8_blockscaled_linear,
            backend=name,
            max_m_8x4=up_to,
        ),
        refusal,
    )


def triton_candidate(fp8_utils) -> Candidate:
    """Upstream's kernel; its GEMM packs both scales at each call, as in a server."""

    def gemm(values, scale, weight, weight_scale):
        return fp8_utils.triton_mxfp8_linear(
            values, weight, weight_scale, scale, torch.bfloat16
        )

    def linear(input, weight, weight_scale):
        return fp8_utils.triton_mxfp8_linear(
            input, weight, weight_scale, None, torch.bfloat16
        )

    return Candidate(
        "triton",
        None,
        fp8_utils.mxfp8_group_quantize,
        gemm,
        linear,
        partial(backend_refusal, "triton"),
    )


def backend_refusal(backend: str, n: int, k: int) -> str:
    """Why `backend` does not take a bf16 layer [N, K], or ""."""
    from sglang.srt.layers.quantization.mxfp8_routing import (
        Mxfp8LinearBackend,
        Mxfp8LinearOptions,
        select_mxfp8_linear_backend,
    )

    wanted = Mxfp8LinearBackend(backend)
    options = Mxfp8LinearOptions(preferred=wanted, available=(wanted,))
    choice = select_mxfp8_linear_backend(options, n, k, torch.bfloat16)
    return "" if choice.backend == wanted else choice.reason


def find_candidates(rehearsal: bool) -> tuple[list[Candidate], Reasons]:
    """What can be measured here, and why the rest cannot."""
    everything = "flashinfer_trtllm, flashinfer_cutlass, triton"
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:  # none, or only this checkout's folders
        return [], {everything: "the patched sglang is not installed"}
    try:
        from sglang.srt.layers.quantization import fp8_utils, mxfp8_routing
    except Exception as error:  # a CUDA library that does not load is no ImportError
        return [], {everything: f"sglang cannot be imported: {first_line(error)}"}
    candidates, reasons = [], {}
    for backend in (mxfp8_routing.TRTLLM, mxfp8_routing.CUTLASS, mxfp8_routing.TRITON):
        missing = mxfp8_routing.mxfp8_kernels_missing(backend)
        if missing and not (rehearsal and backend.is_flashinfer()):
            emulated = "; it has no emulation" if rehearsal else ""
            reasons[backend.value] = f"it needs {missing}{emulated}"
        elif not backend.is_flashinfer():
            candidates.append(triton_candidate(fp8_utils))
        else:
            layouts = ("8x4", "128x4") if backend.is_flashinfer_trtllm() else ("128x4",)
            candidates += [
                flashinfer_candidate(fp8_utils, backend.value, layout)
                for layout in layouts
            ]
    return candidates, reasons


def first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def candidate_work(
    candidate: Candidate, operands: Sequence[Operands], inputs: Sequence[torch.Tensor]
) -> Iterator[tuple[Part, Callable[[], Work]]]:
    """The parts of one candidate, each with what prepares its work."""
    input, weight, _ = operands[0]
    (m, k), n = input.shape, weight.shape[0]
    row_tile = 8 if candidate.layout == "8x4" else 128
    groups = k // GROUP_SIZE
    scale_bytes = swizzled_scale_numel(m, groups, row_tile)
    if candidate.layout is None:
        scale_bytes = m * groups
    quantized = m * k + scale_bytes
    weights, output, flops = n * k + n * groups, 2 * m * n, 2 * m * n * k

    def quantize() -> Work:
        run = partial(each, candidate.quantize, [(x,) for x in inputs])
        return Work(run, len(inputs), 2 * m * k + quantized)

    def gemm() -> Work:
        calls = [(*candidate.quantize(x), w, scale) for x, w, scale in operands]
        run = partial(each, candidate.gemm, calls)
        return Work(run, len(calls), quantized + weights + output, flops)

    def linear() -> Work:
        run = partial(each, candidate.linear, operands)
        return Work(run, len(operands), 2 * m * k + weights + output, flops)

    for prepare in (quantize, gemm, linear):
        yield Part(prepare.__name__, candidate.backend, candidate.layout), prepare


def each(function: Callable, calls: Iterable[Sequence]) -> None:
    for arguments in calls:
        function(*arguments)


def bf16_work(n: int, k: int, m: int, device: str) -> Work:
    """torch's product of bf16 [M, K] and [N, K].T."""
    bytes = 2 * (m * k + n * k + m * n)
    pairs = [
        (
            torch.randn(m, k, dtype=torch.bfloat16, device=device),
            torch.randn(n, k, dtype=torch.bfloat16, device=device),
        )
        for _ in range(rotation(2 * (m * k + n * k)))
    ]
    run = partial(each, torch.nn.functional.linear, pairs)
    return Work(run, len(pairs), bytes, 2 * m * n * k)


def copy_work(nbytes: int, device: str) -> Work:
    """A kernel that reads and writes `nbytes` bytes.

    Not a memcpy, which in a CUDA graph reached 2.7 of 4.1 TB/s on an H200.
    """
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return Work(partial(torch.neg, source, out=target), 1, 2 * nbytes)


class Bench:
    """Measures, and writes a row as soon as it has it. `reasons` grows with what fails."""

    def __init__(self, output: Path, rehearsal: bool) -> None:
        self.rehearsal, self.output = rehearsal, output
        self.device = "cpu" if rehearsal else "cuda"
        self.name = "cpu" if rehearsal else torch.cuda.get_device_name()
        self.repeats = REHEARSAL_REPEATS if rehearsal else REPEATS
        self.rows: list[Row] = []
        self.failed: Reasons = {}

    def peaks(self) -> None:
        """The device's copy bandwidth and its bf16 peak, by a large square product."""
        nbytes = REHEARSAL_COPY_BYTES if self.rehearsal else COPY_BYTES
        side = REHEARSAL_SQUARE if self.rehearsal else SQUARE
        copy = partial(copy_work, nbytes, self.device)
        self.measure((1, None, None), {Part("copy", "torch"): copy})
        square = partial(bf16_work, side, side, side, self.device)
        self.measure((side, side, side), {Part("bf16_gemm", "torch"): square})

    def shape(self, n: int, k: int, m: int, candidates: Sequence[Candidate]) -> None:
        """Everything of one linear [M, K] @ [N, K].T, the parts taken in turn."""
        operands = rotated_operands(n, k, m)
        count = min(MAX_QUANTIZED, rotation(operands[0].input.nbytes))
        inputs = [
            torch.randn(m, k, dtype=torch.bfloat16, device=self.device)
            for _ in range(max(0, count - len(operands)))
        ]
        inputs += [operand.input for operand in operands]
        square = REHEARSAL_SQUARE if self.rehearsal else SQUARE
        work: dict[Part, Callable[[], Work]] = {}
        if (m, n, k) != (square,) * 3:  # that one is measured already
            work[Part("bf16_gemm", "torch")] = partial(bf16_work, n, k, m, self.device)
        for candidate in candidates:
            work.update(candidate_work(candidate, operands, inputs[:count]))
        self.measure((m, n, k), work)

    def measure(
        self, size: tuple, preparations: Mapping[Part, Callable[[], Work]]
    ) -> None:
        """Time these parts alternately; one that fails is noted, the others go on."""
        works, runs = {}, {}
        for part, prepare in preparations.items():
            try:
                works[part] = prepare()
                runs[part] = captured(works[part].run)
            except Exception as error:  # FlashInfer, Triton and torch have their own
                m, n, k = size
                self.failed[f"{part}, M={m}, N={n}, K={k}"] = first_line(error)
        seconds = interleaved_seconds(runs, self.repeats)
        self.write(self.row(part, size, works[part], seconds[part]) for part in seconds)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def row(self, part: Part, size: tuple, work: Work, seconds: list[float]) -> Row:
        us = [round(each / work.calls * 1e6, 4) for each in seconds]
        return Row(
            *(*part, *size, us, work.bytes, work.flops, self.name, self.rehearsal)
        )

    def write(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.rows += rows
        with self.output.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def markdown(rows: Sequence[Row], names: Mapping[Shape, str]) -> str:
    """The rows as tables: one of the device's peaks, then one a shape."""
    copy = next((row for row in rows if row.part == "copy"), None)
    products = [row.teraflops for row in rows if row.part == "bf16_gemm"]
    peaks = copy and copy.gigabytes_per_second, max(products, default=None)
    tables = []
    for n, k in dict.fromkeys((row.n, row.k) for row in rows):
        title = f"{names.get((n, k), '')} [{n}, {k}]".strip() if n else "Copy"
        of_shape = [row for row in rows if (row.n, row.k) == (n, k)]
        tables.append(f"### {title}\n\n{HEAD}\n{table_rows(of_shape, peaks)}")
    return "\n\n".join(tables)


HEAD = (
    "| M | what | median us (min..max) | GB/s | of the copy's | TFLOP/s | of bf16's peak |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def table_rows(rows: Iterable[Row], peaks: Sequence[float | None]) -> str:
    lines = []
    for row in rows:
        cells = [
            str(row.m) if row.n else "",
            str(row.key),
            f"{row.median:.2f} ({min(row.us):.2f}..{max(row.us):.2f})",
        ]
        for rate, peak in zip((row.gigabytes_per_second, row.teraflops), peaks):
            cells.append("-" if rate is None else f"{rate:.4g}")
            cells.append("-" if rate is None or not peak else f"{rate / peak:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(bench: Bench, names: Mapping[Shape, str], left_out: Reasons) -> str:
    """Where and how it was measured, the tables, and what is not in them."""
    lines = [f"{REHEARSAL}\n"] if bench.rehearsal else []
    method = REHEARSAL_METHOD if bench.rehearsal else METHOD
    lines.append(f"# MXFP8 linears\n\n{environment(bench)}\n\n{method}")
    lines.append(markdown(bench.rows, names))
    for title, reasons in (("Left out", left_out), ("Failed", bench.failed)):
        if reasons:
            lines.append(f"## {title}")
            lines += [f"- {what}: {why}" for what, why in reasons.items()]
    return "\n\n".join(lines).replace("\n\n- ", "\n- ")


METHOD = (
    f"Median of the repetitions, each a CUDA graph of calls on operands in turn. Weights "
    "are out of the L2 cache; the quantizer's inputs are, unless M is so small that "
    f"{MAX_QUANTIZED} of them fit (in a server the layer before leaves them there). GB/s "
    "counts the least that a call must read and write; a copy's bytes count twice. "
    "The peaks are the copy's GB/s and the fastest bf16 product's TFLOP/s, as measured "
    "here. Without triton_kernels, Triton's quantizer is plain torch, as in a server."
)
REHEARSAL_METHOD = (
    "The steps of a measurement by the CPU's clock, with emulated kernels: the figures "
    "show the tables' form, and nothing else."
)


def environment(bench: Bench) -> str:
    parts = [f"torch {torch.__version__}", f"FlashInfer {version('flashinfer_python')}"]
    parts += [f"triton_kernels {version('triton_kernels')}"]
    if not bench.rehearsal:
        mib = torch.cuda.get_device_properties(0).L2_cache_size / (1 << 20)
        parts.append(f"driver {driver_version()}, L2 {mib:.0f} MiB")
    date = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{bench.name}; {'; '.join(parts)}; {date}; {bench.repeats} repetitions"


def version(package: str) -> str:
    """The version of an importable package; without one, what is missing."""
    name = package.removesuffix("_python")
    try:
        module = importlib.import_module(name)
    except Exception:  # found, but a library that it loads is not
        return "not usable" if importlib.util.find_spec(name) else "not installed"
    return getattr(module, "__version__", "without a version")


def default_shapes() -> dict[Shape, str]:
    return {
        MODELS[model].linears(tp)[linear]: f"{model} {linear}, TP {tp}"
        for model, tp, linear in MODEL_SHAPES
    }


def shape_argument(text: str) -> Shape:
    try:
        n, k = map(positive, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no shape: N,K, two whole numbers from 1"
        ) from error
    if k % GROUP_SIZE:
        raise argparse.ArgumentTypeError(
            f"{text}: K = {k} is not a multiple of {GROUP_SIZE}, which share a scale"
        )
    return n, k


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    result.add_argument(
        "--shapes",
        nargs="+",
        type=shape_argument,
        metavar="N,K",
        help="of one rank's weight (default: README's, of Qwen3-8B and Llama-70B)",
    )
    result.add_argument("--m", nargs="+", type=positive, help="default: 1, 2, .. 8192")
    result.add_argument(
        "--output", type=Path, metavar="FILE", required=True, help="JSONL, a new file"
    )
    result.add_argument(
        "--rehearse", action="store_true", help="emulate on the CPU, in tiny shapes"
    )
    return result


def checked(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    args = arguments.parse_args()
    has_gpu = torch.cuda.is_available()
    if not args.rehearse and not has_gpu:
        arguments.error(
            "no CUDA GPU is visible; --rehearse runs the steps on the CPU, emulated"
        )
    if args.rehearse and has_gpu:
        arguments.error(
            "--rehearse runs on the CPU, and a GPU is visible: measure on it, or hide it "
            "with CUDA_VISIBLE_DEVICES="
        )
    if args.output.exists() and args.output.stat().st_size:
        arguments.error(
            f"{args.output} exists: name another file, so that its rows are kept"
        )
    if not args.output.parent.is_dir():
        arguments.error(f"{args.output.parent} is no folder")
    return args


def main() -> int:
    args = checked(parser())
    if args.rehearse:
        os.environ["SGLANG_MXFP8_EMULATION"] = "1"
    names = REHEARSAL_SHAPES if args.rehearse else default_shapes()
    names = dict.fromkeys(args.shapes, "") if args.shapes else names
    ms = sorted(set(args.m or (REHEARSAL_M if args.rehearse else DEFAULT_M)))
    candidates, left_out = find_candidates(args.rehearse)
    bench = Bench(args.output, args.rehearse)
    bench.peaks()
    with tqdm(total=len(names) * len(ms), unit="M", file=sys.stderr) as bar:
        for n, k in names:
            fitting = []
            for candidate in candidates:
                if reason := candidate.refusal(n, k):
                    key = f"{candidate.backend} {candidate.layout or ''}".strip()
                    left_out[f"{key} [{n}, {k}]"] = reason
                else:
                    fitting.append(candidate)
            for m in ms:
                bar.set_postfix_str(f"N={n}, K={k}, M={m}")
                bench.shape(n, k, m, fitting)
                bar.update()
    print(report(bench, names, left_out))
    for what, why in bench.failed.items():
        print(f"Failed: {what}: {why}", file=sys.stderr)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
