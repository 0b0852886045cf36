#!/usr/bin/env python3
"""Measure which activation-scale layout FlashInfer's trtllm MXFP8 linear needs, per shape.

Times quantization plus GEMM with 8x4 scales, with 128x4 scales and on cutlass, and writes
the table that the server reads at start (scale_layout.tuned_layers). Every measured shape
is written at once: a run that is cut off keeps what it has. --log takes the shapes from
the line "MXFP8 linear layers: ..." of a server's log. --compare writes no table: it times
every MXFP8 linear that runs on the GPU, and bf16's. Needs .venv (./scripts/setup.sh) and an
SM100 or SM103 GPU, for --compare SM80 or later; --rehearse runs the same steps without a
GPU and measures nothing of use.

    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --log SERVER_LOG
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 2560,8192 8192,4096
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 4096,12288 --compare
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 256,512 --m 1 16 \\
        --rehearse --output DIR
"""

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mxfp8_timing as timing
from mxfp8_timing import FLASHINFER, refusal

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8 import scale_layout
from sglang.srt.utils import get_device_name

OLD, NEW, CUTLASS = FLASHINFER  # trtllm 128x4, trtllm 8x4, cutlass
NAMES = timing.BF16, timing.WEIGHT_ONLY, *FLASHINFER, timing.TRITON
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


def read_table(path: Path, rehearsal: bool, device: str, flashinfer: str) -> dict:
    """The table at `path`, to add shapes to, as scale_layout.parse_table reads it. One that is
    not of this GPU and FlashInfer, or not valid, is set aside as `.old`."""
    here = {"device_name": device, "flashinfer": flashinfer, "rehearsal": rehearsal}
    table = {**here, "layers": {}, "measured": {}}
    if not path.exists():
        return table
    try:
        old = json.loads(path.read_text())
        if old["rehearsal"] != rehearsal:
            raise ValueError("only one of them is a rehearsal")
        scale_layout.parse_table({**old, "rehearsal": False}, device, flashinfer)
        return {**table, "layers": old["layers"], "measured": old["measured"]}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        path.replace(path.with_suffix(".json.old"))
        print(f"{path} is now .old: no shapes can be added: {error}", file=sys.stderr)
        return table


def write_table(path: Path, table: dict) -> None:
    """Write it so that readers see the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=2) + "\n")
    temporary.replace(path)


def measured(names: Sequence[str], n: int, k: int, m: int) -> dict[str, float]:
    """Median microseconds of one linear by candidate, the L2 cache cold."""
    operands = timing.operands(n, k, m)
    names = [name for name in names if not refusal(name, n, k)]
    works = {name: timing.calls(name, operands) for name in names}
    taken = timing.measure(works, 100 if timing.HAS_GPU else 3)
    return {name: round(statistics.median(us), 3) for name, us in taken.items()}


def tune(args: argparse.Namespace) -> Iterator[str]:
    """Measure the shapes, write the table as it grows, and yield the medians."""
    device = get_device_name() or "cpu"
    path = args.output / scale_layout.config_file(device)
    table = read_table(path, args.rehearse, device, scale_layout.flashinfer_version())
    environment = timing.environment()
    yield f"Median us of one linear, quantization included.\n\n{environment}\n"
    yield timing.head("N x K", "M", *FLASHINFER)
    for n, k in args.shapes:
        us = {}
        for m in sorted({*args.m, *args.backend_at}):
            us[m] = measured(FLASHINFER, n, k, m)
            yield timing.row(f"{n} x {k}", m, *(us[m].get(c, "-") for c in FLASHINFER))
        key = f"N={n},K={k}"
        table["layers"][key] = tuned_entry(us, args.backend_at)
        table["measured"][key] = {"environment": environment, "median_us": us}
        write_table(path, table)
        yield timing.row(f"{n} x {k}", "table", table["layers"][key], "", "")
    yield f"\nWrote {path}"


def compare(args: argparse.Namespace) -> Iterator[str]:
    """The medians of all linears, and why some cannot run."""
    yield f"Median us of one linear, quantization included.\n\n{timing.environment()}\n"
    yield timing.head("N x K", "M", *NAMES)
    for n, k in args.shapes:
        for m in sorted({*args.m}):
            us = measured(NAMES, n, k, m)
            yield timing.row(f"{n} x {k}", m, *(us.get(name, "-") for name in NAMES))
    for n, k in args.shapes:
        refused = {name: refusal(name, n, k) for name in NAMES}
        yield from (f"- {name} [{n}, {k}]: {y}" for name, y in refused.items() if y)


def logged_shapes(log: str) -> list[timing.Shape]:
    """The shapes that a server's log names."""
    lines = re.findall(r"MXFP8 linear layers: .*", log)
    found = re.findall(r"\w+ \[(\d+), (\d+)\]", " ".join(lines))
    return [*dict.fromkeys((int(n), int(k)) for n, k in found)]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--shapes", nargs="+", type=timing.shape, metavar="N,K", default=[])
    add("--log", type=Path, help="of a server: tune the shapes that it names")
    add("--m", nargs="+", type=int, metavar="M", default=timing.DEFAULT_M)
    add("--output", type=Path, help="directory (default: where the server looks)")
    add("--backend-at", nargs="+", type=int, metavar="M", default=[])
    add("--compare", action="store_true", help="time all linears, write no table")
    args = timing.parse_arguments(parser)
    if args.rehearse and not (args.compare or args.output):
        parser.error("--rehearse needs --output: no server should find its table")
    if args.log:
        args.shapes += logged_shapes(args.log.read_text(errors="replace"))
    shapes = [] if args.compare else args.shapes
    refused = {shape: why for shape in shapes if (why := refusal(OLD, *shape))}
    args.shapes = [shape for shape in args.shapes if shape not in refused]
    for (n, k), why in refused.items():
        print(f"Left out {n},{k}: {why}", file=sys.stderr)
    if not args.shapes:
        parser.error("no layer for flashinfer_trtllm: give --shapes, or --log")
    folder = envs.SGLANG_MXFP8_CONFIG_DIR.get() or scale_layout.CONFIG_DIR
    args.output = args.output or Path(folder)
    for line in (compare if args.compare else tune)(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
