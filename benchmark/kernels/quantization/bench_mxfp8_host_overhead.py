"""Host time of one MXFP8 linear on FlashInfer: ours beside upstream's, as ratios.

Times `flashinfer_mxfp8_blockscaled_linear` of the installed sglang and the function of
the same name in upstream's 0.5.10.post1 wheel, alternately and in one run, on the CPU
with FlashInfer's `mxfp8_quantize` and `mm_mxfp8` replaced by the same two stubs: what is
left is Python and torch's dispatcher. The first run installs the wheel into .cache.

    python benchmark/kernels/quantization/bench_mxfp8_host_overhead.py --output FILE
    python benchmark/kernels/quantization/bench_mxfp8_host_overhead.py --check
"""

import argparse
import contextlib
import datetime
import importlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[3]
UPSTREAM = "0.5.10.post1"
UPSTREAM_SHA256 = "a854a68b11caf6b4b55c241a44378a7cdede7ede325db85c955f131506703bc6"
UPSTREAM_DIR = ROOT / ".cache" / f"sglang-{UPSTREAM}"
N, K = 4096, 4096
CALLS, ROUNDS = 200, 201  # calls per timing, and timings of each side per case
TARGET = 0.5
SIDES = "ours", "upstream"


class Case(NamedTuple):
    backend: str
    shape: Tuple[int, ...]  # of the input

    @property
    def m(self) -> int:
        return math.prod(self.shape[:-1])


CASES = [
    Case(backend, shape)
    for backend in ("trtllm", "cutlass")
    for shape in ((1, K), (1, 1, K), (64, K), (2, 32, K))
]


# In a worker: one side, with FlashInfer's two kernels stubbed.


class Stubs:
    """FlashInfer's quantizer and GEMM, with its signatures (0.6.7.post3), that return
    the tensors of the current case and compute nothing."""

    quantized: Tuple[torch.Tensor, torch.Tensor]
    output: torch.Tensor

    def prepare(self, m: int) -> None:
        rows = -(-m // 128) * 128
        self.quantized = (
            torch.empty(m, K, dtype=torch.float8_e4m3fn),
            torch.empty(rows * K // 32, dtype=torch.uint8),
        )
        self.output = torch.empty(m, N, dtype=torch.bfloat16)

    def mxfp8_quantize(
        self,
        input,
        is_sf_swizzled_layout=True,
        alignment=32,
        enable_pdl=None,
        backend="cuda",
        sf_swizzle_layout=None,
    ):
        return self.quantized

    def mm_mxfp8(
        self,
        a,
        b,
        a_descale,
        b_descale,
        out=None,
        out_dtype=torch.bfloat16,
        use_8x4_sf_layout=False,
        backend="auto",
    ):
        return self.output

    def alone(self, input, weight, weight_scale, **unused) -> torch.Tensor:
        quantized, scale = self.mxfp8_quantize(input)
        return self.mm_mxfp8(quantized, weight, scale, weight_scale)


def load_ours() -> Callable[[str], Callable]:
    """By backend, the function that a layer of this shape gets, made as the layer does."""
    from sglang.srt.layers.quantization import fp8_utils
    from sglang.srt.layers.quantization.mxfp8_routing import (
        Mxfp8LinearBackend,
        Mxfp8LinearOptions,
        select_mxfp8_linear_backend,
    )

    # The stubs run anywhere; what wraps the kernels is ours, and is timed.
    fp8_utils.mxfp8_kernels_missing = lambda backend: ""

    def get_linear(name: str) -> Callable:
        backend = Mxfp8LinearBackend(f"flashinfer_{name}")
        options = Mxfp8LinearOptions(preferred=backend, available=(backend,))
        choice = select_mxfp8_linear_backend(options, N, K, torch.bfloat16)
        require(choice.backend == backend, choice.reason)
        return fp8_utils.dispatch_w8a8_mxfp8_linear(choice)

    return get_linear


def load_upstream() -> Callable[[str], Callable]:
    """By backend, upstream's function, with the global that its server sets.

    Its module defines the FlashInfer ops only on a Blackwell GPU, and registers ops for
    CUDA. So it is loaded once more as on such a GPU, and its ops get the CPU as well.
    """
    from sglang.srt import utils
    from sglang.srt.layers.quantization import fp8_utils
    from sglang.srt.utils import common

    register_for_cuda = common.direct_register_custom_op

    def register(op_name: str, op_func: Callable, **kwargs) -> None:
        register_for_cuda(op_name=op_name, op_func=op_func, **kwargs)
        common.sglang_lib.impl(op_name, op_func, "CPU")

    def yes() -> bool:
        return True

    with (
        mock.patch.object(utils, "is_blackwell_supported", yes),
        mock.patch.object(utils, "is_flashinfer_available", yes),
        mock.patch.object(common, "direct_register_custom_op", register),
    ):
        importlib.reload(fp8_utils)

    def get_linear(name: str) -> Callable:
        server_args = SimpleNamespace(fp8_gemm_runner_backend=f"flashinfer_{name}")
        fp8_utils.initialize_fp8_gemm_config(server_args)
        return fp8_utils.flashinfer_mxfp8_blockscaled_linear

    return get_linear


def layer_arguments(case: Case, side: str) -> Dict[str, Optional[torch.Tensor]]:
    """What a layer passes, with the parameters as each side keeps them."""
    weight = torch.zeros(N, K, dtype=torch.float8_e4m3fn)
    scale = torch.zeros(N, K // 32, dtype=torch.uint8)
    if side == "upstream" and case.backend == "cutlass":
        scale = scale.view(-1)  # as FlashInfer's block_scale_interleave returns it
    with torch.inference_mode(False):
        weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        scale = torch.nn.Parameter(scale.clone(), requires_grad=False)
    return dict(
        input=torch.zeros(case.shape, dtype=torch.bfloat16),
        weight=weight,
        weight_scale=scale,
        input_scale=None,
        bias=None,
    )


def check_call(linear: Callable, stubs: Stubs, arguments: dict) -> None:
    """A call runs each stub once and returns the GEMM's output, shaped as the input."""
    calls: List[str] = []

    def profile(frame, event, argument) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    linear(**arguments)  # the first call may import and cache
    sys.setprofile(profile)
    try:
        output = linear(**arguments)
    finally:
        sys.setprofile(None)
    for name in ("mxfp8_quantize", "mm_mxfp8"):
        require(calls.count(name) == 1, f"{name}: {calls.count(name)} calls")
    require(output.data_ptr() == stubs.output.data_ptr(), "not the GEMM's output")
    require(output.shape == (*arguments["input"].shape[:-1], N), "wrong shape")


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


@torch.inference_mode()
def work(side: str) -> None:
    """Answer each case index on stdin with the seconds per call of the function and of
    the stubs alone, as a line of JSON; the first line says what is timed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print
    import flashinfer

    import sglang

    stubs = Stubs()
    flashinfer.mxfp8_quantize, flashinfer.mm_mxfp8 = (
        stubs.mxfp8_quantize,
        stubs.mm_mxfp8,
    )
    get_linear = load_upstream() if side == "upstream" else load_ours()
    inside = Path(sglang.__file__).is_relative_to(UPSTREAM_DIR)
    require(inside == (side == "upstream"), f"{side} is {sglang.__file__}")
    print(json.dumps([sglang.__version__, flashinfer.__version__]), file=answers)
    arguments = {case: layer_arguments(case, side) for case in CASES}
    for line in sys.stdin:
        case = CASES[int(line)]
        stubs.prepare(case.m)
        linear = get_linear(case.backend)
        check_call(linear, stubs, arguments[case])
        seconds = [seconds_per_call(f, arguments[case]) for f in (linear, stubs.alone)]
        print(json.dumps(seconds), file=answers)


def seconds_per_call(function: Callable, arguments: dict) -> float:
    """CPU time, which other processes on the machine leave alone."""
    call, clock = (lambda: function(**arguments)), time.thread_time
    return timeit.timeit(call, timer=clock, number=CALLS) / CALLS


# The parent: installs upstream's wheel, and asks both workers in turn.


def install_upstream() -> None:
    """Install upstream's wheel, alone, to UPSTREAM_DIR; done once."""
    if UPSTREAM_DIR.exists():
        return
    uv = os.environ.get("UV") or shutil.which("uv") or ROOT / ".cache/uv/bin/uv"
    command = [uv, "pip", "install", "--no-deps", "--require-hashes"]
    UPSTREAM_DIR.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UPSTREAM_DIR.parent) as directory:
        target = Path(directory) / "target"
        command += ["--python", sys.executable, "--target", target, "-r", "-"]
        wheel = f"sglang=={UPSTREAM} --hash=sha256:{UPSTREAM_SHA256}"
        subprocess.run(command, input=wheel, text=True, check=True)
        target.rename(UPSTREAM_DIR)


class Worker:
    """A process that times one side; see `work`."""

    def __init__(self, side: str) -> None:
        path = [str(ROOT / "scripts" / "cpu_stand_ins"), os.environ.get("PYTHONPATH")]
        if side == "upstream":
            path.insert(0, str(UPSTREAM_DIR))
        changes = dict(
            PYTHONPATH=os.pathsep.join(filter(None, path)),
            CUDA_VISIBLE_DEVICES="",
            SGLANG_USE_CPU_ENGINE="1",
        )
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", side],
            env={**os.environ, **changes},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.version, self.flashinfer = self.read()

    def read(self) -> list:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, case: int) -> Tuple[float, float]:
        """Seconds per call of the function, and of the stubs alone."""
        print(case, file=self.process.stdin)
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Result(NamedTuple):
    """Of each round's ratios of times: ours / upstream's, and stubs / upstream's."""

    ratios: List[float]
    stubs: List[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> str:
        tenths = statistics.quantiles(self.ratios, n=10)
        return f"{tenths[0]:.2f} to {tenths[-1]:.2f}"


def measure(case: int, ours: Worker, upstream: Worker) -> Result:
    result = Result([], [])
    for turn in range(ROUNDS):
        if turn % 2:
            (our, _), (their, stubs) = ours.ask(case), upstream.ask(case)
        else:
            (their, stubs), (our, _) = upstream.ask(case), ours.ask(case)
        result.ratios.append(our / their)
        result.stubs.append(stubs / their)
    return result


HEAD = """\
| backend | input | ours / upstream | 80 % of the rounds | stubs alone / upstream |
| --- | --- | --- | --- | --- |"""


def row(case: Case, result: Result) -> str:
    cells = [
        case.backend,
        str(list(case.shape)),
        f"{result.ratio:.2f}",
        result.spread,
        f"{statistics.median(result.stubs):.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def report(ours: Worker, upstream: Worker, ratios: List[float]) -> Iterator[str]:
    """The lines of the result file, as they are measured; appends to `ratios`."""
    yield "# Host time of an MXFP8 linear\n"
    yield f"Command: `python {Path(__file__).name} --output FILE`, {datetime.date.today()}\n"
    yield f"- CPU: {cpu_model()}; **no GPU, nothing ran on SM100, and no kernel ran**"
    yield f"- Python {platform.python_version()}, torch {torch.__version__}"
    yield f"- ours: sglang {ours.version}; upstream: sglang {upstream.version}"
    yield f"- FlashInfer {ours.flashinfer}, its two kernels stubbed for both\n"
    yield (
        "Host time (CPU time of the calling thread) per call of "
        "`flashinfer_mxfp8_blockscaled_linear`, ours beside the function of the same name "
        "in upstream's wheel, called as a layer calls it: eager, bf16 input, "
        f"N = {N}, K = {K}, no bias, under `torch.inference_mode()`. "
        "`mxfp8_quantize` and `mm_mxfp8` return tensors made before; everything else of "
        "both functions runs, upstream's custom ops through torch's dispatcher included. "
        f"One process for each side, alternating, {ROUNDS} rounds of {CALLS} calls; the "
        "ratio is the median of the rounds' ratios, and nothing is subtracted. Times of a "
        "CPU say nothing about another's, so only ratios stand here.\n"
    )
    yield HEAD
    for index, case in enumerate(CASES):
        result = measure(index, ours, upstream)
        ratios.append(result.ratio)
        yield row(case, result)
    met = "met" if max(ratios) <= TARGET else "NOT met"
    yield f"\nTarget, at most {TARGET:.2f} everywhere: {max(ratios):.2f} at most, {met}"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        lines = []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 if a ratio is over {TARGET}"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    try:
        install_upstream()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot install sglang {UPSTREAM} with uv: {error}", file=sys.stderr)
        return 1
    lines: List[str] = []
    ratios: List[float] = []
    with contextlib.ExitStack() as stack:
        ours, upstream = (
            stack.enter_context(contextlib.closing(Worker(side))) for side in SIDES
        )
        for line in report(ours, upstream, ratios):
            print(line, flush=True)
            lines.append(line)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(lines) + "\n")
    return int(args.check and max(ratios) > TARGET)


if __name__ == "__main__":
    sys.exit(main())
