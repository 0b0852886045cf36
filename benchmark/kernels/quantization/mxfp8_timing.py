"""How the scripts in this folder time an MXFP8 linear: CUDA graphs, weights out of L2.

Needs only torch and this checkout: sglang need not be installed. Without a GPU the same
steps run by the clock, which rehearses them and measures nothing of use.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

# Without an installed sglang, the folders of this checkout are its (namespace) package.
sys.path.append(str(Path(__file__).resolve().parents[3] / "python"))

from sglang.srt.layers.quantization.mxfp8_layout import (
    GROUP_SIZE,
    swizzled_scale_numel,
)

DEFAULT_M = [2**i for i in range(14)]
WARM_UPS = 3
REHEARSAL_COPIES = 2


class Operands(NamedTuple):
    """Input bf16 [M, K], weight e4m3 [N, K], scale uint8 [N, K/32] with room behind it."""

    input: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor


def random_operands(n: int, k: int, m: int, device: str) -> Operands:
    """Kernel forms are permutations, so random bytes are one, of every backend."""
    groups = k // GROUP_SIZE
    size = (swizzled_scale_numel(n, groups),)
    room = torch.randint(117, 124, size, dtype=torch.uint8, device=device)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    return Operands(
        torch.randn(m, k, dtype=torch.bfloat16, device=device),
        weight.to(torch.float8_e4m3fn),
        room[: n * groups].view(n, groups),
    )


def rotated_operands(n: int, k: int, m: int) -> list[Operands]:
    """So many that each is out of the L2 cache before its turn comes again."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = random_operands(n, k, m, device)
    others = rotation(sum(tensor.nbytes for tensor in first)) - 1
    return [first, *(random_operands(n, k, m, device) for _ in range(others))]


def rotation(nbytes: int) -> int:
    """How many operands of `nbytes` bytes, used in turn, never find themselves in L2."""
    if not torch.cuda.is_available():
        return REHEARSAL_COPIES
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    return 1 + max(1, -(-2 * cache // nbytes))


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, without a GPU `run` itself; warmed up."""
    run()
    if not torch.cuda.is_available():
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(WARM_UPS):
        graph.replay()
    return graph.replay


def interleaved_seconds(
    runs: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every repetition of each run, taken in turn: CUDA events, or the clock
    without a GPU."""
    has_gpu = torch.cuda.is_available()
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    timed = timed_on_gpu if has_gpu else timed_on_cpu
    for _ in range(repeats):
        for name, run in runs.items():
            samples[name].append(timed(run))
    if has_gpu:
        torch.cuda.synchronize()
    return {name: [read() for read in taken] for name, taken in samples.items()}


def timed_on_gpu(run: Callable[[], object]) -> Callable[[], float]:
    """Enqueue `run`; its seconds can be read once the device is synchronized."""
    # No wait in between: the host's launch hides behind the run before.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3


def timed_on_cpu(run: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return lambda: seconds


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value
