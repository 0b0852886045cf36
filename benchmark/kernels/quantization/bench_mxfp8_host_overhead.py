#!/usr/bin/env python3
"""Host time of one MXFP8 linear on FlashInfer: ours beside upstream's, as ratios.

Times flashinfer_mxfp8_blockscaled_linear of the installed sglang and the function of the
same name in upstream's 0.5.10.post1 wheel, in processes that alternate, on the CPU with
FlashInfer's mxfp8_quantize and mm_mxfp8 replaced by the same two stubs: what is left is
Python and torch's dispatcher. Needs .venv, and that wheel in .cache: it says how to
install it.

    ./benchmark/kernels/quantization/bench_mxfp8_host_overhead.py --output FILE
    ./benchmark/kernels/quantization/bench_mxfp8_host_overhead.py --check
"""

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mxfp8_timing as timing
import torch

UPSTREAM = "0.5.10.post1"
UPSTREAM_DIR = timing.ROOT / ".cache" / f"sglang-{UPSTREAM}"
INSTALL = f"uv pip install --no-deps --target {UPSTREAM_DIR} sglang=={UPSTREAM}"
N, K = 4096, 4096
CALLS, ROUNDS, TURNS = 200, 40, 5  # calls a timing, timings a case, processes a side
TARGET = 0.5
BACKENDS = "flashinfer_trtllm", "flashinfer_cutlass"
SHAPES = (1, K), (1, 1, K), (64, K), (2, 32, K)  # of the input
CASES = [(backend, shape) for backend in BACKENDS for shape in SHAPES]
METHOD = (
    f"CPU time of the calling thread per call, eager, bf16 input, N = {N}, K = {K}, no "
    "bias, under `torch.inference_mode()`; the stubs return tensors made before, and the "
    "rest of both functions runs, upstream's custom ops through torch's dispatcher "
    f"included. {TURNS} processes a side, alternating, each with {ROUNDS} timings of "
    f"{CALLS} calls: the ratios of the medians. Times of a CPU say nothing about another's."
)


class Stubs:
    """FlashInfer's quantizer and GEMM: they return tensors and compute nothing."""

    def prepare(self, m: int) -> None:
        scale = torch.empty(-(-m // 128) * 128 * K // 32, dtype=torch.uint8)
        self.quantized = torch.empty(m, K, dtype=torch.float8_e4m3fn), scale
        self.output, self.calls = torch.empty(m, N, dtype=torch.bfloat16), 0

    def mxfp8_quantize(self, input, **options):
        self.calls += 1
        return self.quantized

    def mm_mxfp8(self, a, b, a_descale, b_descale, **options):
        self.calls += 1
        return self.output


def our_linear(backend: str) -> Callable:
    """The function that a layer of this shape gets, made as the layer does."""
    from sglang.srt.layers.quantization import fp8_utils
    from sglang.srt.layers.quantization.mxfp8 import routing

    # The stubs run anywhere; what wraps the kernels is ours, and is timed.
    fp8_utils.mxfp8_kernels_missing = lambda backend: ""
    wanted = routing.Mxfp8LinearBackend(backend)
    options = routing.Mxfp8LinearOptions(wanted, available=(wanted,))
    select = routing.select_mxfp8_linear_backend
    return fp8_utils.dispatch_w8a8_mxfp8_linear(select(options, N, K, torch.bfloat16))


def load_upstream() -> None:
    """Give upstream's module its FlashInfer ops, which it defines on a Blackwell GPU and
    registers for CUDA: load it once more as on such a GPU, and give its ops the CPU."""
    from sglang.srt import utils
    from sglang.srt.layers.quantization import fp8_utils
    from sglang.srt.utils import common

    register_for_cuda = common.direct_register_custom_op

    def register(op_name: str, op_func: Callable, **options) -> None:
        register_for_cuda(op_name=op_name, op_func=op_func, **options)
        common.sglang_lib.impl(op_name, op_func, "CPU")

    with (
        mock.patch.object(utils, "is_blackwell_supported", lambda: True),
        mock.patch.object(utils, "is_flashinfer_available", lambda: True),
        mock.patch.object(common, "direct_register_custom_op", register),
    ):
        importlib.reload(fp8_utils)


def upstreams_linear(backend: str) -> Callable:
    """Upstream's function, with the global that its server sets."""
    from sglang.srt.layers.quantization import fp8_utils

    server_args = SimpleNamespace(fp8_gemm_runner_backend=backend)
    fp8_utils.initialize_fp8_gemm_config(server_args)
    return fp8_utils.flashinfer_mxfp8_blockscaled_linear


def seconds_per_call(
    linear: Callable, stubs: Stubs, shape: tuple, is_1d: bool
) -> float:
    """Median of a layer's calls with an input of this shape; `is_1d`: the weight's scale.
    AssertionError unless a call runs each stub once and returns the GEMM's output."""
    weight = torch.zeros(N, K, dtype=torch.float8_e4m3fn)
    scale = torch.zeros(N, K // 32, dtype=torch.uint8)
    parameters = [
        torch.nn.Parameter(each, requires_grad=False)
        for each in (weight, scale.view(-1) if is_1d else scale)
    ]
    with torch.inference_mode():
        stubs.prepare(math.prod(shape[:-1]))
        names = "input", "weight", "weight_scale", "input_scale", "bias"
        input = torch.zeros(shape, dtype=torch.bfloat16)
        arguments = dict(zip(names, (input, *parameters, None, None)))
        output = linear(**arguments)
        is_kernels = output.data_ptr() == stubs.output.data_ptr()
        if stubs.calls != 2 or not is_kernels or output.shape != (*shape[:-1], N):
            raise AssertionError(f"{stubs.calls} calls, output {list(output.shape)}")
        # CPU time, which other processes on the machine leave alone.
        timer = timeit.Timer(lambda: linear(**arguments), timer=time.thread_time)
        return statistics.median(timer.repeat(ROUNDS, CALLS)) / CALLS


def work(side: str) -> None:
    """Print sglang's version, and the seconds per call of each case, as JSON."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print
    import flashinfer

    import sglang

    is_upstreams = side == "upstream"
    if Path(sglang.__file__).is_relative_to(UPSTREAM_DIR) != is_upstreams:
        raise AssertionError(f"{side} is {sglang.__file__}")
    stubs = Stubs()
    flashinfer.mxfp8_quantize = stubs.mxfp8_quantize
    flashinfer.mm_mxfp8 = stubs.mm_mxfp8
    if is_upstreams:
        load_upstream()
    seconds = []
    for backend, shape in CASES:
        linear = upstreams_linear(backend) if is_upstreams else our_linear(backend)
        # As FlashInfer's block_scale_interleave returns it.
        is_1d = is_upstreams and backend == "flashinfer_cutlass"
        seconds.append(seconds_per_call(linear, stubs, shape, is_1d))
    print(json.dumps([sglang.__version__, seconds]), file=answer)


def run_side(side: str) -> list:
    """What `work` prints in a process of its own, without a GPU."""
    path = [str(UPSTREAM_DIR)] if side == "upstream" else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    changes = dict(CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(path))
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
    parser = timing.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="1 if a ratio is too high")
    parser.add_argument("--output", type=Path, help="also write what is printed here")
    parser.add_argument("--side", choices=["ours", "upstream"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args.side)
        return 0
    if not UPSTREAM_DIR.exists():
        parser.error(f"upstream's wheel is not there; install it by\n  {INSTALL}")
    ratios: list[float] = []
    timing.report(report(ratios), args.output)
    return int(args.check and max(ratios) > TARGET)


if __name__ == "__main__":
    sys.exit(main())
