"""Runs a model's MXFP8 kernels once, before they serve, and compares them with plain torch.

Each distinct kernel, shape and scale layout runs on the bytes of a layer that uses it,
through the function that serves it. What is wrong is replaced, or the server stops.

The bound of one element of x @ w^T is two steps of the output's dtype, and what sums of K
products in fp32 may differ by. In any order that is less than K u sum|x w|, u = 2^-24;
independent roundings stay below c sqrt(K) u sum|x w|, but for a chance of 2 exp(-c^2 / 2)
(Higham and Mary, 2019, theorem 2.4). Here c is 8.
"""

import argparse
import logging
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Callable, Dict, List, Tuple

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8 import linears
from sglang.srt.layers.quantization.mxfp8.linears import Choice, Linear
from sglang.srt.layers.quantization.mxfp8.numerics import (
    GROUP_SIZE,
    dequantize,
    quantize,
)
from sglang.srt.layers.quantization.mxfp8.scale_layout import ANY_M, flashinfer_version

logger = logging.getLogger(__name__)

# Rows of input at which a tile of some kernel begins or ends.
TILE_ROWS = (1, 128, 129, 160)
INPUT_BYTES = 96 << 20  # of input in fp64 with its absolute values, at a time
LARGEST_SCALE = 230  # a byte: weights of it, times 2^12 inputs of 2^12, are in fp32
FP32_ROUNDING = 2.0**-24
FP16_SUBNORMAL_ROUNDING = 2.0**-25


@dataclass(frozen=True)
class Kernel:
    """What is checked once: a choice, for one shape and dtype."""

    choice: Choice
    n: int
    k: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weights: Linear) -> "Kernel":
        layer, choice = weights.layer, replace(weights.choice, reason="")
        return cls(choice, *layer.weight.shape, layer.orig_dtype)

    def rows(self) -> List[int]:
        """The M at which the kernel, or the layout of its scales, changes."""
        last = {self.choice.max_m_8x4, self.choice.max_m_fused} - {0, ANY_M}
        return sorted({*TILE_ROWS, *last, *(m + 1 for m in last)})

    def layout(self, m: int) -> str:
        if not self.choice.backend.is_flashinfer_trtllm():
            return ""
        return "8x4" if m <= self.choice.max_m_8x4 else "128x4"

    def at(self, m: int) -> str:
        layout = f", {self.layout(m)} scales" if self.layout(m) else ""
        return f"{self.choice.backend.value} [{self.n}, {self.k}], M = {m}{layout}"


@dataclass
class Result:
    """What one call of a kernel came to.

    Attributes:
        error: the largest error in units of its bound: above 1, or NaN, is wrong.
        failure: what the kernel raised, or "".
    """

    m: int
    error: float = 0.0
    failure: str = ""

    @property
    def is_right(self) -> bool:
        return not self.failure and self.error <= 1

    def __str__(self) -> str:
        return (
            self.failure or f"{self.error:.3g} times the error that rounding explains"
        )


Results = Dict[Kernel, List[Result]]


def checked(model: torch.nn.Module) -> torch.nn.Module:
    """The model, after `check_kernels` unless SGLANG_MXFP8_SELF_CHECK is 0."""
    layers = linears.linears_of(model)
    if layers and envs.SGLANG_MXFP8_SELF_CHECK.get():
        check_kernels(layers, linears.from_every_rank)
    return model


def check_kernels(layers: List[Linear], gather: Callable) -> None:
    """Check the kernels of loaded layers, and give layers whose kernel is wrong another.

    Args:
        gather: collective; the list of every rank's value. All ranks do the same.

    Raises RuntimeError for a wrong kernel that the flag or the environment named or that
    no other replaces, and for one that breaks the CUDA context.
    """
    started, results = time.perf_counter(), {}
    while True:
        new = {Kernel.of(w): w for w in layers if Kernel.of(w) not in results}
        results |= {kernel: run_kernel(kernel, w) for kernel, w in new.items()}
        wrong = _wrong_on_any_rank({kernel: results[kernel] for kernel in new}, gather)
        if not wrong:
            break
        for weights in layers:
            if Kernel.of(weights) in wrong:
                _replace(weights, wrong[Kernel.of(weights)])
    served = {Kernel.of(weights) for weights in layers}
    errors = [result.error for kernel in served for result in results[kernel]]
    logger.info(
        f"MXFP8 self-check: {len(served)} kernels are right; the largest error is "
        f"{max(errors, default=0.0):.2f} of its bound "
        f"({time.perf_counter() - started:.1f} s)"
    )


def _wrong_on_any_rank(results: Results, gather: Callable) -> Results:
    wrong = {
        kernel: [r for r in of if not r.is_right] for kernel, of in results.items()
    }
    merged: Results = {}
    for of_rank in gather({kernel: of for kernel, of in wrong.items() if of}):
        for kernel, of in of_rank.items():
            merged.setdefault(kernel, []).extend(of)
    return merged


def _replace(weights: Linear, wrong: List[Result]) -> None:
    kernel = Kernel.of(weights)
    reason = describe(kernel, wrong)
    if all(result.m <= kernel.choice.max_m_8x4 for result in wrong):
        choice = replace(weights.choice, max_m_8x4=0)
    else:
        choice = linears.choice_after(weights, kernel.dtype, reason)
    instead = replace(kernel, choice=choice).at(wrong[0].m)
    _warn(f"{reason}. {instead} serves instead. Please report it.")
    linears.use(weights, choice)


@lru_cache(maxsize=None)
def _warn(message: str) -> None:
    """Once for all layers of a shape."""
    logger.warning(message)


def describe(kernel: Kernel, wrong: List[Result]) -> str:
    worst = next((r for r in wrong if not r.error <= 1 or r.failure), wrong[0])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return (
        f"MXFP8 self-check: {kernel.at(worst.m)} is wrong: {worst} (on {device}, "
        f"flashinfer {flashinfer_version()})"
    )


def run_kernel(kernel: Kernel, weights: Linear) -> List[Result]:
    """Run a layer's kernel for every M of `kernel.rows()`, and measure its errors.

    Uses random bytes, prepared in the same way, for a layer whose own are all zero, leave
    the range of fp32, or are offloaded. Waits for the GPU twice.
    Raises RuntimeError if that fails: a call broke the CUDA context, and nothing runs then.
    """
    if weights.is_offloaded() or not 0 < linears.largest_scale(weights) < LARGEST_SCALE:
        weights = random_weights(kernel, weights, _device())
    logger.debug(f"MXFP8 self-check: {kernel}")
    results = [Result(m) for m in kernel.rows()]
    try:
        x = _input(kernel, weights.layer.weight.device)
        is_weight_only = kernel.choice.backend.is_weight_only()
        taken = x if is_weight_only else dequantize(*quantize(x))
        errors = []
        for result in results:
            output = _run(kernel, weights, x[: result.m], result)
            errors.append(_error(kernel, weights, taken[: result.m], output))
        _wait(x)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"{describe(kernel, [Result(results[0].m, failure=repr(error))])}. If it broke "
            f"the CUDA context, start {linears.WITH_ANOTHER_BACKEND}"
        ) from error
    for result, error in zip(results, torch.stack(errors).tolist()):
        result.error = error
    return results


def _run(kernel: Kernel, weights: Linear, x: torch.Tensor, result: Result):
    """The output [M, N] of one call, or None if it raised, which `result` then has."""
    # The output is most likely allocated where these lie.
    x.new_full((result.m, kernel.n), float("nan"), dtype=kernel.dtype)
    try:
        return linears.run(weights, x)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        result.failure = repr(error)


def _error(kernel, weights, x: torch.Tensor, output) -> torch.Tensor:
    """The largest error of x @ w^T, in units of its bound, as a scalar on the device."""
    worst = torch.zeros((), dtype=torch.float64, device=x.device)
    step = max(1, INPUT_BYTES // (16 * kernel.k))
    for rows, weight, scale in weights.checkpoint_slabs() if output is not None else ():
        weight = dequantize(weight, scale).double()
        magnitude = weight.abs()
        for m in range(0, len(x), step):
            part = slice(m, m + step)
            found = output[part, rows]
            expected, bound = _expect(kernel, x[part].double(), weight, magnitude)
            error = (found.double() - expected).abs() / bound
            # Of zeros the bound is zero, and beyond the dtype's range is infinity.
            error.masked_fill_(found == expected.to(found.dtype), 0)
            worst = torch.maximum(worst, error.amax())
    return worst


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _expect(
    kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, magnitude: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Of [M, K], [N, K] and its absolute values, in fp64: the product, and how far one
    may be off."""
    expected = x @ weight.t()
    # Just below a power of two, the next number of the dtype is a step of the next size.
    eps = torch.finfo(kernel.dtype).eps
    exponent = torch.frexp(expected * (1 + eps)).exponent - 1
    step = torch.ldexp(torch.full_like(expected, eps), exponent)
    step = step.masked_fill(expected == 0, 0)
    sums = x.abs() @ magnitude.t()
    bound = 2 * step + 8 * kernel.k**0.5 * FP32_ROUNDING * sums
    if kernel.choice.backend.is_weight_only() and kernel.dtype == torch.float16:
        bound += FP16_SUBNORMAL_ROUNDING * x.abs().sum(1, keepdim=True)
    return expected, bound


def _input(kernel: Kernel, device: torch.device) -> torch.Tensor:
    """Random [M, K] of the largest M: groups of many sizes, one of zeros in each row, and
    a row of zeros."""
    generator = torch.Generator(device).manual_seed(0)
    shape = kernel.rows()[-1], kernel.k // GROUP_SIZE
    x = torch.randn(*shape, GROUP_SIZE, generator=generator, device=device)
    x *= torch.randint(-3, 4, shape, generator=generator, device=device).exp2()[
        ..., None
    ]
    row = torch.arange(shape[0], device=device)
    x[row, row % shape[1]] = 0
    x[2] = 0
    return x.flatten(1).to(kernel.dtype)


def random_weights(kernel: Kernel, weights: Linear, device: torch.device) -> Linear:
    """A layer that runs as the given one, with random bytes."""
    generator = torch.Generator(device).manual_seed(1)
    random = partial(
        torch.randint, generator=generator, device=device, dtype=torch.uint8
    )
    codes = random(256, (kernel.n, kernel.k))
    codes.masked_fill_(codes & 0x7F == 0x7F, 0)  # which are NaN
    scale = random(110, 130, (kernel.n, kernel.k // GROUP_SIZE))
    return linears.with_bytes(weights, codes.view(torch.float8_e4m3fn), scale)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Check the MXFP8 kernels of a model's shapes on this machine, with "
        "random weights. Needs the model's config.json only; ends with 1 if one is wrong."
    )
    parser.add_argument("--model", required=True, help="folder of its config.json")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--fp8-gemm-backend", default="auto", help="as of the server")
    arguments = parser.parse_args()
    layers = linears.linears_on_meta(
        arguments.model, arguments.tp, arguments.fp8_gemm_backend
    )
    table, all_right = "{:18} {:>15} {:>6} {:7} {:>9} {:>7}  {}", True
    print(table.format("backend", "[N, K]", "M", "scales", "error", "s", ""))
    for kernel, weights in {Kernel.of(w): w for w in layers}.items():
        started = time.perf_counter()
        results = run_kernel(kernel, random_weights(kernel, weights, _device()))
        seconds = f"{time.perf_counter() - started:.2f}"  # of all M, with compilation
        for result in results:
            all_right &= result.is_right
            shape, layout = f"[{kernel.n}, {kernel.k}]", kernel.layout(result.m)
            note = "" if result.is_right else f"WRONG {result.failure}"
            cells = shape, result.m, layout, f"{result.error:.2f}", seconds, note
            print(table.format(kernel.choice.backend.value, *cells))
            seconds = ""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() >> 20
        print(f"At most {peak} MiB of GPU memory, with the largest weight's bytes")
    sys.exit(0 if all_right else 1)


if __name__ == "__main__":
    main()
