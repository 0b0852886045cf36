"""MXFP8 linears, and how the scripts in this folder time them.

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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

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
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import routing, weight_only
from sglang.srt.layers.quantization.mxfp8.layout import swizzled_scale_numel

REHEARSAL = "REHEARSAL: CPU, kernels emulated; says nothing about speed"
PACKAGES = "torch", "triton", "flashinfer-python", "flashinfer_python"
GROUP_SIZE = 32  # elements along K that share a scale
DEFAULT_M = [2**i for i in range(14)]
BF16, TRITON, WEIGHT_ONLY = "bf16 torch", "triton", "weight_only"
FLASHINFER = (
    "flashinfer_trtllm 128x4",
    "flashinfer_trtllm 8x4",
    "flashinfer_cutlass 128x4",
)
Shape = tuple[int, int]  # (N, K) of one rank's weight


def refusal(name: str, n: int, k: int) -> str:
    """Why `name` cannot compute a bf16 layer [N, K] here, or ""."""
    if name == BF16:
        return ""
    backend, _, layout = name.partition(" ")
    wanted = routing.Mxfp8LinearBackend(backend)
    lacks = routing.mxfp8_kernels_missing(wanted)
    if lacks and (HAS_GPU or not wanted.is_flashinfer()):
        return f"it needs {lacks}"
    # FlashInfer checks the weight's scale by the length of the 8x4 layout.
    if layout == "8x4" and n % 128:
        return f"N = {n} is not a multiple of 128 (8x4)"
    options = routing.Mxfp8LinearOptions(wanted, available=(wanted,))
    select = routing.select_mxfp8_linear_backend
    choice = select(options, n, k, torch.bfloat16)
    return "" if choice.backend == wanted else choice.reason


def operands(n: int, k: int, m: int) -> list[tuple[torch.Tensor, ...]]:
    """Input bf16 [M, K], weight e4m3 [N, K], scale uint8 [N, K/32] with room behind it,
    for as many calls as keep them out of L2.

    Kernel forms are permutations, so random bytes are one, of every backend.
    """
    groups, count = k // GROUP_SIZE, 2
    room = swizzled_scale_numel(n, groups)
    if HAS_GPU:
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        count = 1 + max(1, -(-2 * cache // (n * k + room + 2 * m * k)))
    made = []
    for _ in range(count):
        input = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
        weight = torch.randn(n, k, device=DEVICE).to(torch.float8_e4m3fn)
        scale = torch.randint(117, 124, (room,), dtype=torch.uint8, device=DEVICE)
        made.append((input, weight, scale[: n * groups].view(n, groups)))
    return made


def calls(name: str, operands: Sequence) -> list[Callable[[], torch.Tensor]]:
    """The linear `name` of each of the operands, its kernels emulated in a rehearsal."""
    if name == BF16:  # cuBLAS on a GPU
        linear = torch.nn.functional.linear
        operands = [(input, weight.bfloat16()) for input, weight, _ in operands]
    elif name == WEIGHT_ONLY:
        max_m = weight_only.max_m_fused(*operands[0][1].shape)
        linear = partial(weight_only.weight_only_linear, max_m_fused=max_m)
    elif name == TRITON:
        triton, rest = fp8_utils.triton_mxfp8_linear, (None, torch.bfloat16)
        linear = lambda *each: triton(*each, *rest)
    else:
        backend, layout = name.removeprefix("flashinfer_").split()
        options = dict(backend=backend, max_m_8x4=sys.maxsize if layout == "8x4" else 0)
        linear = partial(fp8_utils.flashinfer_mxfp8_blockscaled_linear, **options)
    return [partial(linear, *each) for each in operands]


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


def measure(works: Mapping[str, Sequence[Callable]], repeats: int) -> dict:
    """Microseconds of a call in every repetition of each work, as graphs, in turn."""
    graphs = {
        name: captured(lambda calls=calls: [call() for call in calls])
        for name, calls in works.items()
    }
    turns = [{name: timed(run) for name, run in graphs.items()} for _ in range(repeats)]
    if HAS_GPU:
        torch.cuda.synchronize()
    us = lambda name: [turn[name]() * 1e6 / len(works[name]) for turn in turns]
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


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, and --rehearse, which is for machines without a GPU only."""
    parser.add_argument("--rehearse", action="store_true", help="emulate, on the CPU")
    args = parser.parse_args()
    if args.rehearse == HAS_GPU:
        parser.error("--rehearse is for machines without a CUDA GPU, and needed there")
    if args.rehearse:
        os.environ["SGLANG_MXFP8_EMULATION"] = "1"
    return args
