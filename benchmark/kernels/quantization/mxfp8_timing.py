"""How the scripts in this folder time kernels, and what they share.

CUDA graphs of calls on operands in turn, so many that each is out of the L2 cache before
its turn comes again; what is compared takes turns; medians. Without a GPU the same steps
run by the clock, which rehearses them and measures nothing of use.

To be imported before torch: importing it starts the script again in `.venv`, if there is
one. Without an installed sglang, this checkout's own files are its package.
"""

import argparse
import datetime
import functools
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "scripts"))
try:
    from in_venv import run_in_venv
except ImportError:  # in a checkout of sglang, which is installed
    pass
else:
    run_in_venv(needs="torch")
sys.path.append(str(ROOT / "python"))
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
if not HAS_GPU:  # as scripts/test.sh does, for sglang to be imported
    sys.path.insert(0, str(ROOT / "scripts" / "cpu_stand_ins"))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
REHEARSAL = "REHEARSAL: CPU, kernels emulated; says nothing about speed"
GROUP_SIZE = 32  # elements along K that share a scale
DEFAULT_M = [2**i for i in range(14)]
# Layers, hidden size, rows of qkv_proj, columns of o_proj, intermediate size.
MODELS = {
    "Qwen3-8B": (36, 4096, 6144, 4096, 12288),
    "Llama-3-70B": (80, 8192, 10240, 8192, 28672),
}
Shape = tuple[int, int]  # (N, K) of one rank's weight


def linears(model: str, tp: int) -> dict[str, Shape]:
    """(N, K) of one rank's linears, as sglang fuses them."""
    _, hidden, qkv, heads, intermediate = MODELS[model]
    return {
        "qkv_proj": (qkv // tp, hidden),
        "o_proj": (hidden, heads // tp),
        "gate_up_proj": (2 * intermediate // tp, hidden),
        "down_proj": (hidden, intermediate // tp),
    }


class Work(NamedTuple):
    """`run` makes `calls` calls, each of which must move at least `bytes`."""

    run: Callable[[], object]
    calls: int = 1
    bytes: int = 0


def each(function: Callable, calls: Iterable[Sequence]) -> None:
    for arguments in calls:
        function(*arguments)


def rotation(nbytes: int) -> int:
    """How many operands of `nbytes` bytes, used in turn, never find themselves in L2."""
    if not HAS_GPU:
        return 2
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    return 1 + max(1, -(-2 * cache // nbytes))


def rotated_operands(n: int, k: int, m: int) -> list[tuple[torch.Tensor, ...]]:
    """Input bf16 [M, K], weight e4m3 [N, K], scale uint8 [N, K/32] with room behind it,
    for as many calls as keep them out of L2.

    Kernel forms are permutations, so random bytes are one, of every backend.
    """
    from sglang.srt.layers.quantization.mxfp8.layout import swizzled_scale_numel

    room = (swizzled_scale_numel(n, k // GROUP_SIZE),)
    return [
        (
            torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE),
            torch.randn(n, k, device=DEVICE).to(torch.float8_e4m3fn),
            torch.randint(117, 124, room, dtype=torch.uint8, device=DEVICE)[
                : n * k // GROUP_SIZE
            ].view(n, k // GROUP_SIZE),
        )
        for _ in range(rotation(n * k + room[0] + 2 * m * k))
    ]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, without a GPU `run` itself; warmed up."""
    run()
    if not HAS_GPU:
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    return graph.replay


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Start `run`; its seconds can be read once the device is synchronized."""
    if not HAS_GPU:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return lambda: seconds
    # No wait in between: the host's launch hides behind the run before.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3


def measure(works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Microseconds a call of every repetition of each work, as graphs, taken in turn."""
    graphs = {name: captured(work.run) for name, work in works.items()}
    turns = [{name: timed(run) for name, run in graphs.items()} for _ in range(repeats)]
    if HAS_GPU:
        torch.cuda.synchronize()
    us = lambda name: [turn[name]() * 1e6 / works[name].calls for turn in turns]
    return {name: us(name) for name in works}


def medians(works: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Median microseconds of one call of each work."""
    taken = measure(works, repeats)
    return {name: statistics.median(us) for name, us in taken.items()}


@functools.cache
def plain_speeds() -> dict[str, float]:
    """Bytes a second of a plain read and of a plain copy, which reads and writes.

    Kernels, not a memcpy, which in a CUDA graph reached 2.7 of 4.1 TB/s on an H200.
    """
    source = torch.ones(1 << 28 if HAS_GPU else 1 << 18, device=DEVICE)
    target = torch.empty_like(source)
    works = {
        "read": Work(lambda: source.sum(), 1, source.nbytes),
        "copy": Work(lambda: torch.neg(source, out=target), 1, 2 * source.nbytes),
    }
    taken = medians(works, 20)
    return {name: work.bytes / taken[name] * 1e6 for name, work in works.items()}


def floor_us(nbytes: int) -> float:
    """Microseconds that moving these bytes takes at the faster of the plain speeds."""
    return nbytes / max(plain_speeds().values()) * 1e6


def environment() -> str:
    """Where, when and with what this is measured, in a line."""
    gpu, driver = REHEARSAL, "no driver"
    if HAS_GPU:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = f"driver {subprocess.check_output(query, text=True).split()[0]}"
        gpu = torch.cuda.get_device_name()
    names = {each.name for each in importlib.metadata.distributions()}
    names &= {"torch", "triton", "flashinfer-python", "flashinfer_python"}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in sorted(names)]
    return "; ".join([gpu, driver, *versions, str(datetime.date.today())])


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*titles: str) -> str:
    return f"{row(*titles)}\n{row(*['---'] * len(titles))}"


def report(lines: Iterable[str], output: Path | None = None) -> None:
    """Print the lines as they come, and append each to `output` at once."""
    for line in lines:
        print(line, flush=True)
        if output:
            with output.open("a") as file:
                print(line, file=file)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def shape(text: str) -> Shape:
    """An argparse type: N,K."""
    n, k = map(positive, text.split(","))
    if k % GROUP_SIZE:
        raise argparse.ArgumentTypeError(f"{text}: K is not a multiple of {GROUP_SIZE}")
    return n, k


def parser(description: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw)


def rehearsable(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, and --rehearse, which is for machines without a GPU only."""
    parser.add_argument("--rehearse", action="store_true", help="emulate, on the CPU")
    args = parser.parse_args()
    if not args.rehearse and not HAS_GPU:
        parser.error(
            "no CUDA GPU is visible; --rehearse emulates it, and times nothing"
        )
    if args.rehearse and HAS_GPU:
        parser.error("--rehearse is for the CPU; CUDA_VISIBLE_DEVICES= hides the GPU")
    if args.rehearse:
        os.environ["SGLANG_MXFP8_EMULATION"] = "1"
    return args
