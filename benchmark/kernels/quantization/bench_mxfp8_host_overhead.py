#!/usr/bin/env python3
"""Host time of one MXFP8 linear on FlashInfer: ours beside upstream's, as ratios.

Times flashinfer_mxfp8_blockscaled_linear of the installed sglang and the function of the
same name in upstream's 0.5.10.post1 wheel, in processes that alternate, on the CPU with
FlashInfer's mxfp8_quantize and mm_mxfp8 replaced by the same two stubs: what is left is
Python and torch's dispatcher. The first run installs the wheel into .cache. Needs .venv.

    ./benchmark/kernels/quantization/bench_mxfp8_host_overhead.py --output FILE
    ./benchmark/kernels/quantization/bench_mxfp8_host_overhead.py --check
"""

import argparse
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mxfp8_timing as timing
import torch

UPSTREAM = "0.5.10.post1"
UPSTREAM_SHA256 = "a854a68b11caf6b4b55c241a44378a7cdede7ede325db85c955f131506703bc6"
UPSTREAM_DIR = timing.ROOT / ".cache" / f"sglang-{UPSTREAM}"
N, K = 4096, 4096
CALLS, ROUNDS, TURNS = 200, 40, 5  # calls a timing, timings a case, processes a side
TARGET = 0.5
SHAPES = (1, K), (1, 1, K), (64, K), (2, 32, K)  # of the input
BACKENDS = "flashinfer_trtllm", "flashinfer_cutlass"
CASES = [(backend, shape) for backend in BACKENDS for shape in SHAPES]
METHOD = (
    "CPU time of the calling thread per call, eager, bf16 input, "
    f"N = {N}, K = {K}, no bias, under `torch.inference_mode()`; the stubs return tensors "
    "made before. Everything else of both functions runs, upstream's custom ops through "
    f"torch's dispatcher included. {TURNS} processes a side, alternating, each with "
    f"{ROUNDS} timings of {CALLS} calls: the ratios of the medians. Times of a CPU say "
    "nothing about another's, so only ratios stand here."
)


class Stubs:
    """FlashInfer's quantizer and GEMM: they return tensors and compute nothing."""

    calls = 0

    def prepare(self, m: int) -> None:
        scale = torch.empty(-(-m // 128) * 128 * K // 32, dtype=torch.uint8)
        self.quantized = torch.empty(m, K, dtype=torch.float8_e4m3fn), scale
        self.output = torch.empty(m, N, dtype=torch.bfloat16)

    def mxfp8_quantize(self, input, **options):
        self.calls += 1
        return self.quantized

    def mm_mxfp8(self, a, b, a_descale, b_descale, **options):
        self.calls += 1
        return self.output


def our_linears() -> Callable[[str], Callable]:
    """By backend, the function that a layer of this shape gets, made as the layer does."""
    from sglang.srt.layers.quantization import fp8_utils, mxfp8_routing

    # The stubs run anywhere; what wraps the kernels is ours, and is timed.
    fp8_utils.mxfp8_kernels_missing = lambda backend: ""

    def get_linear(flag: str) -> Callable:
        wanted = mxfp8_routing.Mxfp8LinearBackend(flag)
        options = mxfp8_routing.Mxfp8LinearOptions(wanted, available=(wanted,))
        select = mxfp8_routing.select_mxfp8_linear_backend
        choice = select(options, N, K, torch.bfloat16)
        return fp8_utils.dispatch_w8a8_mxfp8_linear(choice)

    return get_linear


def upstreams_linears() -> Callable[[str], Callable]:
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

    with (
        mock.patch.object(utils, "is_blackwell_supported", lambda: True),
        mock.patch.object(utils, "is_flashinfer_available", lambda: True),
        mock.patch.object(common, "direct_register_custom_op", register),
    ):
        importlib.reload(fp8_utils)

    def get_linear(flag: str) -> Callable:
        server_args = SimpleNamespace(fp8_gemm_runner_backend=flag)
        fp8_utils.initialize_fp8_gemm_config(server_args)
        return fp8_utils.flashinfer_mxfp8_blockscaled_linear

    return get_linear


def layer_arguments(backend: str, shape: tuple, side: str) -> dict:
    """What a layer passes, with the parameters as each side keeps them."""
    scale = torch.zeros(N, K // 32, dtype=torch.uint8)
    if side == "upstream" and backend == "flashinfer_cutlass":
        scale = scale.view(-1)  # as FlashInfer's block_scale_interleave returns it
    weight = torch.zeros(N, K, dtype=torch.float8_e4m3fn)
    return dict(
        input=torch.zeros(shape, dtype=torch.bfloat16),
        weight=torch.nn.Parameter(weight, requires_grad=False),
        weight_scale=torch.nn.Parameter(scale, requires_grad=False),
        input_scale=None,
        bias=None,
    )


def check_call(linear: Callable, stubs: Stubs, arguments: dict) -> None:
    """A call runs each stub once and returns the GEMM's output, shaped as the input."""
    linear(**arguments)  # the first call may import and cache
    stubs.calls, shape = 0, (*arguments["input"].shape[:-1], N)
    output = linear(**arguments)
    is_kernels = stubs.calls == 2 and output.data_ptr() == stubs.output.data_ptr()
    if not is_kernels or output.shape != shape:
        raise AssertionError(f"{stubs.calls} calls of kernels, {list(output.shape)}")


def work(side: str) -> None:
    """Print sglang's version, and the median seconds of a call for each case, as JSON."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print
    import flashinfer

    import sglang

    if Path(sglang.__file__).is_relative_to(UPSTREAM_DIR) != (side == "upstream"):
        raise AssertionError(f"{side} is {sglang.__file__}")
    stubs = Stubs()
    flashinfer.mxfp8_quantize = stubs.mxfp8_quantize
    flashinfer.mm_mxfp8 = stubs.mm_mxfp8
    get_linear = our_linears() if side == "ours" else upstreams_linears()
    seconds = []
    for backend, shape in CASES:
        arguments = layer_arguments(backend, shape, side)
        linear = get_linear(backend)
        with torch.inference_mode():
            stubs.prepare(math.prod(shape[:-1]))
            arguments["input"] = torch.zeros(shape, dtype=torch.bfloat16)
            check_call(linear, stubs, arguments)
            # CPU time, which other processes on the machine leave alone.
            timer = timeit.Timer(lambda: linear(**arguments), timer=time.thread_time)
            taken = timer.repeat(ROUNDS, CALLS)
        seconds.append(statistics.median(taken) / CALLS)
    print(json.dumps([sglang.__version__, seconds]), file=answer)


def install_upstream() -> None:
    """Install upstream's wheel, alone, to UPSTREAM_DIR; done once."""
    if UPSTREAM_DIR.exists():
        return
    uv = os.environ.get("UV") or shutil.which("uv") or timing.ROOT / ".cache/uv/bin/uv"
    UPSTREAM_DIR.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UPSTREAM_DIR.parent) as folder:
        command = [uv, "pip", "install", "--no-deps", "--require-hashes", "-r", "-"]
        command += ["--python", sys.executable, "--target", f"{folder}/target"]
        wheel = f"sglang=={UPSTREAM} --hash=sha256:{UPSTREAM_SHA256}"
        subprocess.run(command, input=wheel, text=True, check=True)
        Path(folder, "target").rename(UPSTREAM_DIR)


def run_side(side: str) -> list:
    """What `work` prints in a process of its own, without a GPU."""
    path = [str(UPSTREAM_DIR)] if side == "upstream" else []
    path += [str(timing.ROOT / "scripts/cpu_stand_ins"), os.environ.get("PYTHONPATH")]
    changes = dict(CUDA_VISIBLE_DEVICES="", SGLANG_USE_CPU_ENGINE="1")
    changes["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-W", "ignore", __file__, "--side", side]
    environment = {**os.environ, **changes}
    return json.loads(subprocess.check_output(command, env=environment, text=True))


def report(ratios: list[float]) -> Iterator[str]:
    """The lines of the result; appends to `ratios`."""
    turns = [(run_side("ours"), run_side("upstream")) for _ in range(TURNS)]
    (ours, _), (upstream, _) = turns[0]
    yield f"# Host time of an MXFP8 linear\n\n{timing.environment()}"
    yield f"sglang {ours}, and upstream's {upstream}; **no kernel ran**\n\n{METHOD}\n"
    yield timing.head("backend", "input", "ours / upstream", "by turn")
    for index, (backend, shape) in enumerate(CASES):
        by_turn = [our[1][index] / their[1][index] for our, their in turns]
        ratios.append(statistics.median(by_turn))
        spread = f"{min(by_turn):.2f} to {max(by_turn):.2f}"
        yield timing.row(backend, list(shape), f"{ratios[-1]:.2f}", spread)
    met = "met" if max(ratios) <= TARGET else "NOT met"
    yield f"\nTarget, at most {TARGET:.2f} everywhere: {max(ratios):.2f} at most, {met}"


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="1 if a ratio is too high")
    parser.add_argument("--output", type=Path, help="also write what is printed here")
    parser.add_argument("--side", choices=["ours", "upstream"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args.side)
        return 0
    try:
        install_upstream()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"cannot install sglang {UPSTREAM} with uv: {error}")
    ratios: list[float] = []
    timing.report(report(ratios), args.output)
    return int(args.check and max(ratios) > TARGET)


if __name__ == "__main__":
    sys.exit(main())
