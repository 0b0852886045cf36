#!/usr/bin/env python3
"""Measure which activation-scale layout FlashInfer's trtllm MXFP8 linear needs, per shape.

Times quantization plus GEMM with 8x4 scales, with 128x4 scales and on cutlass, and writes
the table that the server reads at start (scale_layout.tuned_layers). Every measured shape
is written at once: a run that is cut off keeps what it has. --log takes the shapes from
the line "MXFP8 linear layers: ..." of a server's log. --compare writes no table: it times
every MXFP8 linear that runs on the GPU, and bf16's. Needs .venv (./scripts/setup.sh) and an
SM100 or SM103 GPU, for --compare SM80 or later; --rehearse runs the same steps without a
GPU and measures nothing of use.

Medians of CUDA graphs of calls on operands in turn, so many that each is out of the L2
cache before its turn comes again; what is compared takes turns. Without a GPU the same
steps run by the clock.

    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --log SERVER_LOG
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 2560,8192 8192,4096
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 4096,12288 --compare
    ./benchmark/kernels/quantization/tune_mxfp8_layout.py --shapes 256,512 --m 1 16 \\
        --rehearse --output DIR
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import distributions
from itertools import product
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
from sglang.srt.environ import envs
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import scale_layout, shapes, weight_only
from sglang.srt.layers.quantization.mxfp8.layout import swizzled_scale_numel
from sglang.srt.utils.common import get_device_name

try:
    from sglang.srt.layers.quantization.mxfp8 import routing
except ImportError:  # sglang 0.5.23 has another, and no Triton product for these GPUs
    routing = None

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
OLD, NEW, CUTLASS = FLASHINFER  # trtllm 128x4, trtllm 8x4, cutlass
NAMES = (BF16, WEIGHT_ONLY, *FLASHINFER, *([TRITON] if routing else []))
Medians = Mapping[int, Mapping[str, float]]  # microseconds by M and candidate


def lacks(backend: str) -> str:
    """What the backend needs and this machine does not have, or ""."""
    if routing:
        wanted = routing.Mxfp8LinearBackend(backend)
        return routing.mxfp8_kernels_missing(wanted) or ""
    if backend == WEIGHT_ONLY:
        return ""
    wanted = fp8_utils.Mxfp8DenseGemmBackend(backend)
    return fp8_utils._mxfp8_dense_gemm_lacks(wanted)


def refusal(name: str, n: int, k: int) -> str:
    """Why `name` cannot compute a bf16 layer [N, K] here, or ""."""
    if name == BF16:
        return ""
    backend, _, layout = name.partition(" ")
    if (HAS_GPU or name not in FLASHINFER) and (missing := lacks(backend)):
        return f"it needs {missing}"
    # FlashInfer checks the weight's scale by the length of the 8x4 layout.
    if layout == "8x4" and n % 128:
        return f"N = {n} is not a multiple of 128 (8x4)"
    return shapes.refusal(backend, n, k, torch.bfloat16) or ""


def rotated_operands(n: int, k: int, m: int) -> list[tuple[torch.Tensor, ...]]:
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
        linear = flashinfer_linear(*name.removeprefix("flashinfer_").split())
    return [partial(linear, *each) for each in operands]


def flashinfer_linear(backend: str, layout: str) -> Callable:
    """Of (input, weight, scale), a scale [N, K/32] with the room of its kernel form."""
    always = {"max_m_8x4": sys.maxsize} if layout == "8x4" else {}
    of_backend = partial(fp8_utils.flashinfer_mxfp8_blockscaled_linear, backend=backend)
    if routing:
        return partial(of_backend, **always)
    linear = partial(fp8_utils.trtllm_mxfp8_linear, **always) if always else of_backend
    room = lambda scale: scale.as_strided((scale.untyped_storage().nbytes(),), (1,))
    return lambda input, weight, scale: linear(input, weight, room(scale))


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
    operands = rotated_operands(n, k, m)
    names = [name for name in names if not refusal(name, n, k)]
    works = {name: calls(name, operands) for name in names}
    taken = measure(works, 100 if HAS_GPU else 3)
    return {name: round(statistics.median(us), 3) for name, us in taken.items()}


def tune(args: argparse.Namespace) -> Iterator[str]:
    """Measure the shapes and yield the medians, and write the table as it grows."""
    names = NAMES if args.compare else FLASHINFER
    path = args.output / scale_layout.config_file(args.device)
    here, version = environment(), scale_layout.flashinfer_version()
    yield f"Median us of one linear, quantization included.\n\n{here}\n"
    yield head("N x K", "M", *names)
    for n, k in args.shapes:
        us = {}
        for m in sorted({*args.m, *args.backend_at}):
            us[m] = measured(names, n, k, m)
            yield row(f"{n} x {k}", m, *(us[m].get(name, "-") for name in names))
        if not args.compare:
            table = read_table(path, args.rehearse, args.device, version)
            entry, key = tuned_entry(us, args.backend_at), f"N={n},K={k}"
            table["layers"][key] = entry
            table["measured"][key] = {"environment": here, "median_us": us}
            write_table(path, table)
            yield row(f"{n} x {k}", "table", entry, "", "")
    yield "" if args.compare else f"\nWrote {path}"


def logged_shapes(log: str) -> list[Shape]:
    """The shapes that a server's log names."""
    lines = re.findall(r"MXFP8 linear(?: layers:|s) .*", log)
    found = re.findall(r" \[(\d+), (\d+)\]", " ".join(lines))
    return [*dict.fromkeys((int(n), int(k)) for n, k in found)]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape, metavar="N,K", default=[])
    add("--log", type=Path, help="of a server: tune the shapes that it names")
    add("--m", nargs="+", type=int, metavar="M", default=DEFAULT_M)
    add("--output", type=Path, help="directory (default: where the server looks)")
    add("--backend-at", nargs="+", type=int, metavar="M", default=[])
    add("--compare", action="store_true", help="time all linears, write no table")
    add("--rehearse", action="store_true", help="emulate, on the CPU")
    args = parser.parse_args()
    if args.rehearse == HAS_GPU:
        parser.error("--rehearse is for machines without a CUDA GPU, and needed there")
    if args.rehearse:
        os.environ["SGLANG_MXFP8_EMULATION"] = "1"
        if not routing:
            from sglang.srt.layers.quantization.mxfp8 import local_cpu

            local_cpu.install()
    if args.rehearse and not (args.compare or args.output):
        parser.error("--rehearse needs --output: no server should find its table")
    if args.backend_at and not routing:
        parser.error("--backend-at: this release takes the layout alone from a table")
    if args.log:
        args.shapes += logged_shapes(args.log.read_text(errors="replace"))
    for name, (n, k) in product(NAMES if args.compare else [OLD], args.shapes):
        if why := refusal(name, n, k):
            print(f"Left out {name} [{n}, {k}]: {why}", file=sys.stderr)
    if not args.compare:
        args.shapes = [shape for shape in args.shapes if not refusal(OLD, *shape)]
    if not args.shapes:
        parser.error("no layer for flashinfer_trtllm: give --shapes, or --log")
    folder = envs.SGLANG_MXFP8_CONFIG_DIR.get() or scale_layout.CONFIG_DIR
    args.output = args.output or Path(folder)
    args.device = get_device_name() or "cpu"
    for line in tune(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
