#!/usr/bin/env python3
"""Measure which activation-scale layout FlashInfer's trtllm MXFP8 linear needs, per shape.

Times quantization plus GEMM with 8x4 scales, with 128x4 scales and on cutlass, and writes
the table that the server reads at start (routing.tuned_layers). Every measured shape
is written at once: a run that is cut off keeps what it has. --log takes the shapes from
the line "MXFP8 linear layers: ..." of a server's log. Needs an SM100 or SM103 GPU
and FlashInfer; --rehearse runs the same steps without a GPU and measures nothing of use.

    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --log SERVER_LOG
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 2560,8192 8192,4096
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 256,512 --m 1 16 \\
        --rehearse --output DIR
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import mxfp8_timing as timing
from bench_mxfp8_linear import CONTENDERS

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8 import routing
from sglang.srt.utils import get_device_name

TRTLLM = routing.Mxfp8LinearBackend.FLASHINFER_TRTLLM
OLD, NEW, CUTLASS = CANDIDATES = (
    "flashinfer_trtllm 128x4",
    "flashinfer_trtllm 8x4",
    "flashinfer_cutlass 128x4",
)
Medians = Mapping[int, Mapping[str, float]]  # microseconds by M and candidate


def crossover(us: Medians) -> int:
    """The largest M up to which 8x4 is at least as fast at every measured M.

    0 where 8x4 loses at the smallest M, or was not measured.
    """
    largest = 0
    for m in sorted(us):
        if us[m].get(NEW, float("inf")) > us[m][OLD]:
            break
        largest = m
    return largest


def tuned_entry(us: Medians, backend_at: Sequence[int] = ()) -> dict:
    """What the table says of a shape; without `backend_at`, the flag keeps the backend.

    Else it is the one with the smaller sum of medians over these M, trtllm on a tie and
    with the layout that the table gives it at each M.
    """
    entry = {"max_m_8x4": crossover(us)}
    if backend_at:
        layouts = {m: NEW if m <= entry["max_m_8x4"] else OLD for m in backend_at}
        trtllm = sum(us[m][layout] for m, layout in layouts.items())
        fastest = OLD if trtllm <= sum(us[m][CUTLASS] for m in layouts) else CUTLASS
        entry["backend"] = fastest.split()[0]
    return entry


def new_table(
    n: int, k: int, us: Medians, backend_at: Sequence[int], here: dict
) -> dict:
    """The table of one shape, as routing.parse_table reads it.

    `here` has `device_name` and `flashinfer`, which the server compares with its own,
    `rehearsal`, and whatever else is worth keeping beside each shape's medians.
    """
    key = f"N={n},K={k}"
    return {
        **{name: here[name] for name in ("device_name", "flashinfer", "rehearsal")},
        "layers": {key: tuned_entry(us, backend_at)},
        "measured": {key: {"environment": here, "median_us": us}},
    }


def merged_table(old: dict, new: dict) -> dict:
    """`new`, and the shapes of `old` that it lacks. Raises ValueError where `old` is no
    valid table for the GPU and FlashInfer version of `new`, or only one is a rehearsal.
    """
    try:
        if bool(old.get("rehearsal")) != new["rehearsal"]:
            raise ValueError("only one of them is a rehearsal")
        real = {**old, "rehearsal": False}
        routing.parse_table(real, new["device_name"], new["flashinfer"])
        parts = ("layers", "measured")
        return {**new, **{part: {**old.get(part, {}), **new[part]} for part in parts}}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it is no table: {error}") from error


def write_table(directory: Path, table: dict) -> Path:
    """Write the table under the name that the server looks for; returns the file.

    Other shapes in an existing table are kept; one that cannot be merged is kept beside
    the new one as `.old`. Readers see the old file or the new one, whole.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / routing.config_file(table["device_name"])
    if path.exists():
        try:
            table = merged_table(json.loads(path.read_text()), table)
        except ValueError as error:
            path.replace(path.with_suffix(".json.old"))
            print(f"{path} is now .old: it cannot be merged: {error}", file=sys.stderr)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=2) + "\n")
    temporary.replace(path)
    return path


def measured(n: int, k: int, m: int) -> dict[str, float]:
    """Median microseconds of one linear by candidate, the L2 cache cold."""
    operands = timing.rotated_operands(n, k, m)
    works = {}
    for name in CANDIDATES:
        contender = CONTENDERS[name]()
        if not contender.refusal(n, k):
            run = partial(timing.each, contender.linear, operands)
            works[name] = timing.Work(run, len(operands))
    us = timing.medians(works, 100 if timing.HAS_GPU else 3)
    return {name: round(median, 3) for name, median in us.items()}


def tune(args: argparse.Namespace) -> Iterator[str]:
    """Measure the shapes, write the table as it grows, and yield the medians."""
    here = {
        "device_name": get_device_name() or "cpu",
        "flashinfer": routing.flashinfer_version(),
        "rehearsal": args.rehearse,
        "measured_on": timing.environment(),
    }
    yield f"Median us of one linear, quantization included.\n\n{here['measured_on']}\n"
    yield timing.head("N x K", "M", *CANDIDATES)
    for n, k in args.shapes:
        us = {}
        for m in sorted({*args.m, *args.backend_at}):
            us[m] = measured(n, k, m)
            yield timing.row(f"{n} x {k}", m, *(us[m].get(c, "-") for c in CANDIDATES))
        table = new_table(n, k, us, args.backend_at, here)
        path = write_table(args.output, table)
        yield timing.row(f"{n} x {k}", "table", *table["layers"].values())
    yield f"\nWrote {path}"


def logged_shapes(log: str) -> list[timing.Shape]:
    """The shapes that a server's log names, those that flashinfer_trtllm takes."""
    lines = re.findall(r"MXFP8 linear layers: .*", log)
    found = re.findall(r"\w+ \[(\d+), (\d+)\]", " ".join(lines))
    shapes = dict.fromkeys((int(n), int(k)) for n, k in found)
    return [shape for shape in shapes if not refusal(*shape)]


def refusal(n: int, k: int) -> str:
    """Why flashinfer_trtllm does not take a bf16 layer [N, K], or ""."""
    return CONTENDERS[OLD]().refusal(n, k)


def main() -> None:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", type=timing.shape, metavar="N,K", default=[])
    add("--log", type=Path, help="of a server: tune the shapes that it names")
    add("--m", nargs="+", type=timing.positive, metavar="M", default=timing.DEFAULT_M)
    add("--output", type=Path, help="directory (default: where the server looks)")
    add("--backend-at", nargs="+", type=timing.positive, metavar="M", default=[])
    args = timing.rehearsable(parser)
    missing = routing.mxfp8_kernels_missing(TRTLLM)
    if not args.rehearse and missing:
        parser.error(f"flashinfer_trtllm does not run here: it needs {missing}")
    if args.rehearse and args.output is None:
        parser.error("--rehearse needs --output: no server should find its table")
    for n, k in args.shapes:
        if reason := refusal(n, k):
            parser.error(f"{n},{k}: {reason}")
    if args.log:
        args.shapes += logged_shapes(args.log.read_text(errors="replace"))
    if not args.shapes:
        parser.error("--shapes, or a --log that names a layer for flashinfer_trtllm")
    folder = envs.SGLANG_MXFP8_CONFIG_DIR.get() or routing.CONFIG_DIR
    args.output = args.output or Path(folder)
    timing.report(tune(args))


if __name__ == "__main__":
    main()
