"""How the scripts in this folder time kernels, and what they share.

CUDA graphs of calls on operands in turn, so many that each is out of the L2 cache before
its turn comes again; what is compared takes turns; medians. Without a GPU the same steps
run by the clock, which rehearses them and measures nothing of use.

To be imported before torch: it starts the script again in `.venv`, if there is one.
"""

import argparse
import datetime
import os
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "scripts"))
try:
    from in_venv import run_in_venv
except ImportError:  # in a checkout of sglang, which is installed
    pass
else:
    run_in_venv()
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
if not HAS_GPU:  # as scripts/test.sh does, for sglang to be imported
    sys.path.insert(0, str(ROOT / "scripts" / "cpu_stand_ins"))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
from sglang.srt.layers.quantization.mxfp8.layout import swizzled_scale_numel

REHEARSAL = "REHEARSAL: CPU, kernels emulated; says nothing about speed"
PACKAGES = "torch", "triton", "flashinfer-python", "flashinfer_python"
GROUP_SIZE = 32  # elements along K that share a scale
DEFAULT_M = [2**i for i in range(14)]
Shape = tuple[int, int]  # (N, K) of one rank's weight
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
    groups = k // GROUP_SIZE
    room = swizzled_scale_numel(n, groups)
    operands = []
    for _ in range(rotation(n * k + room + 2 * m * k)):
        input = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
        weight = torch.randn(n, k, device=DEVICE).to(torch.float8_e4m3fn)
        scale = torch.randint(117, 124, (room,), dtype=torch.uint8, device=DEVICE)
        operands.append((input, weight, scale[: n * groups].view(n, groups)))
    return operands


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
        seconds = timeit.timeit(run, number=1)
        return lambda: seconds
    # No wait in between: the host's launch hides behind the run before.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3


def measure(works: Mapping, repeats: int) -> dict:
    """Microseconds of a call in every repetition of each work, as graphs, in turn."""
    graphs = {name: captured(work.run) for name, work in works.items()}
    turns = [{name: timed(run) for name, run in graphs.items()} for _ in range(repeats)]
    if HAS_GPU:
        torch.cuda.synchronize()
    us = lambda name: [turn[name]() * 1e6 / works[name].calls for turn in turns]
    return {name: us(name) for name in works}


def environment() -> str:
    """Where, when and with what this is measured, in a line."""
    where = [REHEARSAL]
    if HAS_GPU:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.check_output(query, text=True).split()[0]
        where = [torch.cuda.get_device_name(), f"driver {driver}"]
    found = sorted(distributions(), key=lambda package: package.name)
    where += [f"{each.name} {each.version}" for each in found if each.name in PACKAGES]
    return "; ".join([*where, str(datetime.date.today())])


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*titles: str) -> str:
    return f"{row(*titles)}\n{row(*['---'] * len(titles))}"


def shape(text: str) -> Shape:
    """An argparse type: N,K."""
    n, k = map(int, text.split(","))
    if k % GROUP_SIZE:
        raise argparse.ArgumentTypeError(f"{text}: K is not a multiple of {GROUP_SIZE}")
    return n, k


def rehearsable(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, and --rehearse, which is for machines without a GPU only."""
    parser.add_argument("--rehearse", action="store_true", help="emulate, on the CPU")
    args = parser.parse_args()
    if args.rehearse == HAS_GPU:
        parser.error("--rehearse is for machines without a CUDA GPU, and needed there")
    if args.rehearse:
        os.environ["SGLANG_MXFP8_EMULATION"] = "1"
    return args
