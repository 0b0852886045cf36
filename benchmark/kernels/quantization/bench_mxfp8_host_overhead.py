#!/usr/bin/env python3
"""Host time of one MXFP8 linear on FlashInfer: ours beside upstream's, as ratios.

flashinfer_mxfp8_blockscaled_linear beside the function of the same name in upstream's
0.5.10.post1, whose fp8_utils.py is loaded beside ours: eager, under
`torch.inference_mode()`, without bias. FlashInfer's quantizer and GEMM are stubs that
return tensors made before, so what is left is Python and torch's dispatcher. CPU time of
the calling thread per call; the two take turns, and a ratio is of the medians. Times of a
CPU say nothing about another's.

Needs .venv (./scripts/setup.sh), and upstream's wheel in .cache, where
`./scripts/patchset check --release 0.5.10.post1` puts it. A GPU is not used.

    ./benchmark/kernels/quantization/bench_mxfp8_host_overhead.py | tee host_overhead.md
"""

import math
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from unittest import mock
from zipfile import ZipFile

import mxfp8_timing as timing

timing.need_sglang()
import flashinfer
import torch

STUBS = SimpleNamespace(quantized=None, output=None)  # what the kernels return
flashinfer.mxfp8_quantize = lambda input, **options: STUBS.quantized
flashinfer.mm_mxfp8 = lambda a, b, a_descale, b_descale, **options: STUBS.output

from sglang.srt import utils
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import routing
from sglang.srt.utils import common

UPSTREAM = timing.ROOT / ".cache" / "sglang-0.5.10.post1-py3-none-any.whl"
N, K = 4096, 4096
CALLS, ROUNDS = 200, 100  # calls a timing, timings of each
BACKENDS = "flashinfer_trtllm", "flashinfer_cutlass"
SHAPES = (1, K), (1, 1, K), (64, K), (2, 32, K)  # of the input


def our_linear(backend: str) -> Callable:
    """The function that a layer of this shape gets, made as the layer does."""
    # The stubs run anywhere; what wraps the kernels is ours, and is timed.
    fp8_utils.mxfp8_kernels_missing = lambda backend: ""
    wanted = routing.Mxfp8LinearBackend(backend)
    options = routing.Mxfp8LinearOptions(wanted, available=(wanted,))
    select = routing.select_mxfp8_linear_backend
    return fp8_utils.dispatch_w8a8_mxfp8_linear(select(options, N, K, torch.bfloat16))


def load_upstream() -> ModuleType:
    """Upstream's module as on a Blackwell GPU, where it has FlashInfer's ops; they get
    names of their own, and the CPU beside CUDA."""
    module = ModuleType("upstream_fp8_utils")
    with ZipFile(UPSTREAM) as wheel:
        code = wheel.read("sglang/srt/layers/quantization/fp8_utils.py").decode()
    code = code.replace('op_name="', 'op_name="upstream_')
    register_for_cuda = common.direct_register_custom_op

    def register(op_name: str, op_func: Callable, **options) -> None:
        register_for_cuda(op_name=op_name, op_func=op_func, **options)
        common.sglang_lib.impl(op_name, op_func, "CPU")

    common.direct_register_custom_op = register  # is called when an op is
    yes = lambda: True
    names = {"is_blackwell_supported": yes, "is_flashinfer_available": yes}
    with mock.patch.multiple(utils, **names):
        exec(compile(code, "fp8_utils.py", "exec"), module.__dict__)
    return module


def timer(linear: Callable, shape: tuple, scale_shape: tuple) -> timeit.Timer:
    """Of a layer's calls with an input and a weight's scale of these shapes."""
    weights = [
        torch.zeros(N, K, dtype=torch.float8_e4m3fn),
        torch.zeros(scale_shape, dtype=torch.uint8),
    ]
    weights = [torch.nn.Parameter(each, requires_grad=False) for each in weights]
    names = "input", "weight", "weight_scale", "input_scale", "bias"
    input = torch.zeros(shape, dtype=torch.bfloat16)
    arguments = dict(zip(names, (input, *weights, None, None)))
    output = linear(**arguments)
    assert output.data_ptr() == STUBS.output.data_ptr(), "not the GEMM's output"
    # CPU time, which other processes on the machine leave alone.
    return timeit.Timer(lambda: linear(**arguments), timer=time.thread_time)


def compare(upstream: ModuleType, backend: str, shape: tuple) -> str:
    m = math.prod(shape[:-1])
    scale = torch.empty(-(-m // 128) * 128 * K // 32, dtype=torch.uint8)
    STUBS.quantized = torch.empty(m, K, dtype=torch.float8_e4m3fn), scale
    STUBS.output = torch.empty(m, N, dtype=torch.bfloat16)
    flags = SimpleNamespace(fp8_gemm_runner_backend=backend)
    upstream.initialize_fp8_gemm_config(flags)
    # As FlashInfer's block_scale_interleave returns it.
    is_1d = backend == "flashinfer_cutlass"
    scale_shape = (N * K // 32,) if is_1d else (N, K // 32)
    ours = timer(our_linear(backend), shape, (N, K // 32))
    theirs = timer(upstream.flashinfer_mxfp8_blockscaled_linear, shape, scale_shape)
    turns = [(ours.timeit(CALLS), theirs.timeit(CALLS)) for _ in range(ROUNDS)]
    ratio = statistics.median(a for a, _ in turns) / statistics.median(
        b for _, b in turns
    )
    tenths = statistics.quantiles([a / b for a, b in turns], n=10)
    spread = f"{tenths[0]:.2f} to {tenths[-1]:.2f}"
    return timing.row(backend, list(shape), f"{ratio:.2f}", spread)


def report() -> Iterator[str]:
    yield f"# Host time of an MXFP8 linear\n\n{timing.environment()}\n"
    yield f"{timing.method(__doc__)} N = {N}, K = {K}; **no kernel ran**.\n"
    yield timing.head("backend", "input", "ours / upstream", "80 % of the turns")
    upstream = load_upstream()
    with torch.inference_mode():
        for backend in BACKENDS:
            for shape in SHAPES:
                yield compare(upstream, backend, shape)


def main() -> None:
    parser = timing.parser(__doc__)
    parser.parse_args()
    if not UPSTREAM.exists():
        parser.error(f"{UPSTREAM} is missing (see --help)")
    for line in report():
        print(line, flush=True)


if __name__ == "__main__":
    main()
