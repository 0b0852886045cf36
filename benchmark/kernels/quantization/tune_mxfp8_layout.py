"""Measure which activation-scale layout FlashInfer's trtllm MXFP8 linear needs, per shape.

Times quantization plus GEMM with 8x4 scales, with 128x4 scales and on cutlass, and writes
the table that the server reads at start (mxfp8_routing.tuned_layers). Every measured shape
is written at once: a run that is cut off keeps what it has. Needs an SM100 or SM103 GPU
and FlashInfer; --rehearse runs the same steps without them and measures nothing of use.

    python benchmark/kernels/quantization/tune_mxfp8_layout.py --model PATH --tp 4
    python benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 2560,8192 8192,4096
    python benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 256,512 --m 1 16 \\
        --rehearse --output DIR
"""

import argparse
import copy
import datetime
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from bench_mxfp8_weight_prep import driver_version
from mxfp8_timing import (
    DEFAULT_M,
    Operands,
    captured,
    interleaved_seconds,
    positive,
    rotated_operands,
)
from tqdm import tqdm

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.fp8_utils import flashinfer_mxfp8_linear
from sglang.srt.layers.quantization.mxfp8_routing import (
    ANY_M,
    CONFIG_DIR,
    Mxfp8LinearBackend,
    Mxfp8LinearOptions,
    config_file,
    flashinfer_version,
    mxfp8_kernels_missing,
    parse_table,
    select_mxfp8_linear_backend,
)
from sglang.srt.utils import get_device_name, is_cuda

TRTLLM = Mxfp8LinearBackend.FLASHINFER_TRTLLM
CUTLASS = Mxfp8LinearBackend.FLASHINFER_CUTLASS
# backend and max_m_8x4 of flashinfer_mxfp8_linear
CANDIDATES = {
    "trtllm_8x4": ("trtllm", ANY_M),
    "trtllm_128x4": ("trtllm", 0),
    "cutlass": ("cutlass", 0),
}
REPEATS, REHEARSAL_REPEATS = 100, 3
REHEARSAL_NOTE = (
    "This is a rehearsal: an emulation was timed, which says nothing about the speed of "
    "FlashInfer's kernels. The server ignores the table."
)

Shape = Tuple[int, int]  # (N, K) of one rank's weight
Microseconds = Dict[str, Dict[int, float]]  # medians, by candidate and M


class Measured(NamedTuple):
    """Median microseconds of one linear [M, K] @ [N, K].T.

    `us` has every candidate of CANDIDATES that takes the shape, all at the same M.
    """

    n: int
    k: int
    us: Microseconds

    @property
    def key(self) -> str:
        return f"N={self.n},K={self.k}"

    @property
    def max_m_8x4(self) -> int:
        return crossover(self.us.get("trtllm_8x4", {}), self.us["trtllm_128x4"])

    def fastest(self, m: int) -> str:
        return min(self.us, key=lambda candidate: self.us[candidate][m])


def crossover(us_8x4: Mapping[int, float], us_128x4: Mapping[int, float]) -> int:
    """The largest M up to which 8x4 is at least as fast at every measured M.

    Both by M, in the same unit. 0 where 8x4 loses at the smallest M, or was not measured.
    """
    largest = 0
    for m in sorted(us_8x4):
        if us_8x4[m] > us_128x4[m]:
            break
        largest = m
    return largest


def fastest_backend(measured: Measured, at: Sequence[int]) -> str:
    """The backend with the smaller sum of medians over the M of `at`; trtllm on a tie.

    trtllm counts with the layout that the table gives it at each M.
    """
    layouts = {
        m: "trtllm_8x4" if m <= measured.max_m_8x4 else "trtllm_128x4" for m in at
    }
    trtllm = sum(measured.us[layout][m] for m, layout in layouts.items())
    cutlass = sum(measured.us["cutlass"][m] for m in layouts)
    return (TRTLLM if trtllm <= cutlass else CUTLASS).value


def tuned_entry(measured: Measured, backend_at: Sequence[int] = ()) -> dict:
    """What the table says of a shape; without `backend_at`, the flag keeps the backend."""
    entry = {"max_m_8x4": measured.max_m_8x4}
    if backend_at:
        entry["backend"] = fastest_backend(measured, backend_at)
    return entry


def new_table(
    measured: Sequence[Measured],
    environment: Mapping[str, str],
    backend_at: Sequence[int] = (),
    rehearsal: bool = False,
) -> dict:
    """The table of these shapes, as `mxfp8_routing.tuned_layers` reads it.

    Args:
        environment: `device_name` and `flashinfer` (a version), which the server compares
            with its own, and whatever else is worth keeping beside each shape's medians.
        backend_at: the M that choose a shape's backend, all of them measured.
    """
    return {
        "device_name": environment["device_name"],
        "flashinfer": environment["flashinfer"],
        **({"rehearsal": True} if rehearsal else {}),
        "layers": {shape.key: tuned_entry(shape, backend_at) for shape in measured},
        "measured": {
            shape.key: {"environment": dict(environment), "median_us": shape.us}
            for shape in measured
        },
    }


def merged_table(old: Optional[dict], new: dict) -> dict:
    """`new`, and the shapes of `old` that it lacks.

    Raises ValueError where `old` is no valid table for the GPU and FlashInfer version of
    `new`, or only one of them is a rehearsal.
    """
    if old is None:
        return new
    try:
        if bool(old.get("rehearsal")) != bool(new.get("rehearsal")):
            raise ValueError("only one of them is a rehearsal")
        parse_table({**old, "rehearsal": False}, new["device_name"], new["flashinfer"])
        parts = ("layers", "measured")
        return {**new, **{part: {**old.get(part, {}), **new[part]} for part in parts}}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot be merged with new results: {error}") from error


def read_table(path: Path) -> Optional[dict]:
    """The JSON in `path`, None without such a file; ValueError where it is no JSON."""
    return json.loads(path.read_text()) if path.exists() else None


def write_table(directory: Path, table: dict) -> Path:
    """Write the table under the name that the server looks for; returns the file.

    Other shapes in an existing table are kept; one that cannot be merged is replaced, and
    kept beside the new one as `.old`. Readers see the old file or the new one, whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / config_file(table["device_name"])
    try:
        table = merged_table(read_table(path), table)
    except ValueError as error:
        backup = path.with_suffix(".json.old")
        print(f"{path}: {error}. It is now {backup}.", file=sys.stderr)
        path.replace(backup)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=2) + "\n")
    temporary.replace(path)
    return path


def markdown(measured: Sequence[Measured], names: Mapping[Shape, str]) -> str:
    """The medians as a Markdown table, the fastest of each row in bold."""
    head = ["layer", "N x K", "M", *(f"{name} us" for name in CANDIDATES)]
    rows = [head, ["---"] * len(head)]
    for shape in measured:
        for m in sorted(shape.us["trtllm_128x4"]):
            size = f"{shape.n} x {shape.k}"
            cells = [_cell(shape, candidate, m) for candidate in CANDIDATES]
            rows.append([names.get((shape.n, shape.k), ""), size, str(m), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(shape: Measured, candidate: str, m: int) -> str:
    if candidate not in shape.us:
        return "-"
    text = f"{shape.us[candidate][m]:.2f}"
    return f"**{text}**" if candidate == shape.fastest(m) else text


def summary(measured: Sequence[Measured], backend_at: Sequence[int] = ()) -> str:
    """A line per shape: what the table says, and what is fastest at both ends of M."""
    lines = []
    for shape in measured:
        entry = tuned_entry(shape, backend_at)
        up_to = entry["max_m_8x4"]
        layout = f"8x4 up to M = {up_to}" if up_to else "128x4"
        backend = entry.get("backend", "left to --fp8-gemm-backend")
        ms = sorted(shape.us["trtllm_128x4"])
        ends = [
            f"at M = {m} {shape.fastest(m)}" for m in dict.fromkeys((ms[0], ms[-1]))
        ]
        lines.append(
            f"- {shape.key}: {layout}; backend {backend}; fastest {', '.join(ends)}"
        )
    return "\n".join(lines)


def refusal(n: int, k: int) -> str:
    """Why flashinfer_trtllm does not take a bf16 layer [N, K], or ""."""
    options = Mxfp8LinearOptions(preferred=TRTLLM, available=(TRTLLM, CUTLASS))
    choice = select_mxfp8_linear_backend(options, n, k, torch.bfloat16)
    return "" if choice.backend == TRTLLM else choice.reason


def model_shapes(
    path: str, tp: int = 1, quantization: Optional[str] = None
) -> Tuple[Dict[Shape, str], List[str]]:
    """The shapes of a model's MXFP8 layers on one of `tp` ranks, for flashinfer_trtllm.

    Returns the names of the layers that run there by (N, K), and a line for each that
    does not. `quantization` is the server's flag: "mxfp8" for a bf16 checkpoint.
    """
    from sglang.srt.layers.quantization.mxfp8_weights import name_mxfp8_layers

    names: Dict[Shape, List[str]] = {}
    others: List[str] = []
    for weights in name_mxfp8_layers(build_on_meta(path, tp, quantization)):
        kind, shape = weights.name.split(".")[-1], tuple(weights.layer.weight.shape)
        if weights.backend == TRTLLM:
            names.setdefault(shape, []).append(kind)
        else:
            others.append(f"{kind} {list(shape)}: {weights.choice.reason}")
    joined = {shape: ", ".join(dict.fromkeys(kinds)) for shape, kinds in names.items()}
    return joined, list(dict.fromkeys(others))


def build_on_meta(path: str, tp: int, quantization: Optional[str]) -> torch.nn.Module:
    """The model as rank 0 of a server with --tp builds it, without memory or weights."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    args = ServerArgs(
        model_path=path,
        tp_size=tp,
        quantization=quantization,
        device="cuda" if is_cuda() else "cpu",
        # Not auto, which lets a table that is being replaced choose.
        fp8_gemm_runner_backend=TRTLLM.value,
        skip_tokenizer_init=True,
    )
    set_global_server_args_for_scheduler(args)
    initialize_moe_config(args)
    initialize_fp8_gemm_config(args)
    pretend_tensor_parallel(tp)
    config = ModelConfig.from_server_args(args)
    initialize_dp_attention(args, config)
    get_model_architecture(config)  # models make tensors when imported: not on meta
    quant_config = loader._get_quantization_config(config, LoadConfig())
    with loader.set_default_torch_dtype(config.dtype), torch.device("meta"):
        return loader._initialize_model(config, LoadConfig(), quant_config)


def pretend_tensor_parallel(tp: int) -> None:
    """Make this process rank 0 of `tp` to layers that ask; nothing can communicate."""
    from sglang.srt.distributed import parallel_state
    from sglang.test.mxfp8_utils import init_single_process_parallel_state

    init_single_process_parallel_state()
    # One process has one group for everything; those of experts and context stay at 1.
    group = copy.copy(parallel_state._TP)
    group.world_size = tp
    for name in ("_TP", "_ATTN_TP", "_MOE_TP"):
        setattr(parallel_state, name, group)


def linears(operands: Sequence[Operands], backend: str, max_m_8x4: int) -> None:
    for input, weight, scale in operands:
        flashinfer_mxfp8_linear(
            input, weight, scale, None, torch.bfloat16, backend, max_m_8x4
        )


def measure_at(n: int, k: int, m: int, rehearsal: bool) -> Dict[str, float]:
    """Median microseconds of one linear by candidate, the L2 cache cold."""
    operands = rotated_operands(n, k, m)
    runs = {
        name: captured(lambda settings=settings: linears(operands, *settings))
        for name, settings in CANDIDATES.items()
        # FlashInfer checks the weight's scale by the length of the 8x4 layout.
        if name != "trtllm_8x4" or n % 128 == 0
    }
    seconds = interleaved_seconds(runs, REHEARSAL_REPEATS if rehearsal else REPEATS)
    return {
        name: statistics.median(taken) / len(operands) * 1e6
        for name, taken in seconds.items()
    }


def measure(n: int, k: int, ms: Sequence[int], rehearsal: bool, bar: tqdm) -> Measured:
    us: Microseconds = {}
    for m in ms:
        bar.set_postfix_str(f"N={n}, K={k}, M={m}")
        for name, median in measure_at(n, k, m, rehearsal).items():
            us.setdefault(name, {})[m] = round(median, 3)
        bar.update()
        if is_cuda():
            torch.cuda.empty_cache()
    return Measured(n, k, us)


def environment() -> Dict[str, str]:
    """What the measurements depend on; `device_name` and `flashinfer` as the server's."""
    return {
        "device_name": get_device_name() or "cpu",
        "flashinfer": flashinfer_version(),
        "driver": driver_version() if is_cuda() else "none",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }


def tune(names: Mapping[Shape, str], args: argparse.Namespace) -> None:
    """Measure the shapes, write the table as it grows, and print the medians."""
    ms = sorted({*args.m, *args.backend_at})
    found, measured = environment(), []
    with tqdm(total=len(names) * len(ms), unit="M", file=sys.stderr) as bar:
        for n, k in names:
            measured.append(measure(n, k, ms, args.rehearse, bar))
            table = new_table(measured[-1:], found, args.backend_at, args.rehearse)
            path = write_table(args.output, table)
    versions = ", ".join(f"{key} {value}" for key, value in found.items())
    cold = REHEARSAL_NOTE if args.rehearse else "CUDA graphs, cold L2 cache."
    print(f"Median time of one linear, quantization included. {cold}\n\n{versions}\n")
    print(f"{markdown(measured, names)}\n\n{summary(measured, args.backend_at)}\n")
    print(f"Wrote {path}")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shapes = result.add_mutually_exclusive_group(required=True)
    shapes.add_argument("--model", help="tune the shapes of this checkpoint's layers")
    shapes.add_argument("--shapes", nargs="+", type=shape_argument, metavar="N,K")
    result.add_argument("--tp", type=positive, default=1, help="the server's --tp")
    result.add_argument(
        "--quantization",
        choices=["mxfp8"],
        help="the server's --quantization, for a bf16 checkpoint",
    )
    result.add_argument("--m", nargs="+", type=positive, default=DEFAULT_M)
    result.add_argument(
        "--output", type=Path, help="directory (default: where the server looks)"
    )
    result.add_argument(
        "--backend-at",
        nargs="+",
        type=positive,
        default=[],
        metavar="M",
        help="also choose each shape's backend, by the sum of its medians at these M",
    )
    result.add_argument(
        "--rehearse",
        action="store_true",
        help="emulate; needs --output, and no kernels",
    )
    return result


def shape_argument(text: str) -> Shape:
    n, k = (positive(part) for part in text.split(","))
    reason = refusal(n, k)
    if reason:
        raise argparse.ArgumentTypeError(f"{text}: {reason}")
    return n, k


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    missing = mxfp8_kernels_missing(TRTLLM)
    if not args.rehearse and missing:
        arguments.error(
            f"cannot measure flashinfer_trtllm here: it needs {missing}. --rehearse "
            "runs the steps without it."
        )
    if args.rehearse and not missing:
        arguments.error("--rehearse: this machine has the kernels, so measure them")
    if args.rehearse and args.output is None:
        arguments.error("--rehearse needs --output: no server should find its table")
    if args.rehearse:
        envs.SGLANG_MXFP8_EMULATION.set(True)
    args.output = args.output or Path(envs.SGLANG_MXFP8_CONFIG_DIR.get() or CONFIG_DIR)
    names, others = dict.fromkeys(args.shapes or (), ""), []
    if args.model:
        names, others = model_shapes(args.model, args.tp, args.quantization)
    for line in others:
        print(f"Not on flashinfer_trtllm: {line}", file=sys.stderr)
    if not names:
        arguments.error(
            f"no MXFP8 layer of {args.model} runs on flashinfer_trtllm; for a bf16 "
            "checkpoint, add --quantization mxfp8"
        )
    tune(names, args)


if __name__ == "__main__":
    main()
