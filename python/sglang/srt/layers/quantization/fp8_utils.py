"""
Fp8GemmRunnerBackend
    why: --fp8-gemm-backend flashinfer_cutlass
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later

_dispatch_explicit_backend
    why: flashinfer_cutlass has no block-FP8 kernel; say so instead of "unknown"
    until: the base is 0.5.10 or later

_get_triton_mxfp8_downcast, mxfp8_group_quantize
    why: MXFP8 must not depend on triton_kernels, which ships inside sgl-kernel
    until: upstream's quantizer has no such dependency

Mxfp8LinearBackend, resolve_mxfp8_linear_backend, select_mxfp8_linear_backend
    why: one place decides what a server can run and what each layer runs on
    thread: sgl-project/sglang#21576
    until: upstream chooses per layer at load

mxfp8_kernels_available, _no_mxfp8_kernels
    why: fail at start, naming what is missing, instead of at the first forward
    until: upstream checks at start

dispatch_w8a8_mxfp8_linear, flashinfer_mxfp8_blockscaled_linear, flashinfer_mxfp8_linear
    why: MXFP8 dense linears on FlashInfer's trtllm and cutlass GEMMs
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later

flashinfer_mxfp8_quantize, flashinfer_mm_mxfp8, _register_mxfp8_op
    why: the two halves of the linear, as torch custom ops
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later

bf16_mxfp8_linear, mxfp8_bf16_matmul
    why: a layer that no MXFP8 kernel takes still has to be served
    until: a kernel takes every shape
"""

from __future__ import annotations

import importlib.metadata
from enum import Enum
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Callable, Optional, Tuple

import torch
from overlay.marks import drop, prepend
from packaging.version import Version

from sglang.srt.environ import envs
from sglang.srt.layers.quantization import mxfp8_emulation
from sglang.srt.layers.quantization.mxfp8_layout import (
    GROUP_SIZE,
    dequantized_weight,
    kernel_scale,
    swizzle_scale,
    swizzled_scale_numel,
)
from sglang.srt.utils.common import sglang_lib
from sglang.srt.utils.custom_op import register_custom_op

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8_utils import (
        get_device_capability,
        get_fp8_gemm_runner_backend,
        is_cuda,
        is_flashinfer_available,
        is_sm100_supported,
        triton_mxfp8_blockscaled_linear,
    )


class Fp8GemmRunnerBackend(Enum):
    FLASHINFER_CUTLASS = "flashinfer_cutlass"

    def is_flashinfer_cutlass(self) -> bool:
        return self == Fp8GemmRunnerBackend.FLASHINFER_CUTLASS


@prepend
def _dispatch_explicit_backend(backend):
    if backend.is_flashinfer_cutlass():
        raise ValueError(
            "--fp8-gemm-backend=flashinfer_cutlass serves MXFP8 linear layers only; "
            "for block-scaled FP8 choose another backend, or auto."
        )


@drop
def _get_triton_mxfp8_downcast(): ...


def mxfp8_group_quantize(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Quantize a 2-D tensor to MXFP8 along its last dimension, in groups of 32.

    Args:
        x: bf16, fp16 or fp32 [M, K], K % 32 == 0.

    Returns e4m3 [M, K] and E8M0 uint8 [M, K/32], both contiguous. Uses triton_kernels
    for a CUDA tensor where it is installed, and plain torch otherwise.
    """
    assert x.dim() == 2, f"Expected 2D input, got {x.dim()}D"
    assert x.shape[1] % GROUP_SIZE == 0, f"K={x.shape[1]} must be divisible by 32"
    if not x.is_cuda:
        return mxfp8_emulation.quantize(x)
    try:
        from triton_kernels.numerics_details.mxfp import downcast_to_mxfp
    except ImportError:
        return mxfp8_emulation.quantize(x)
    values, scale = downcast_to_mxfp(x.contiguous(), torch.float8_e4m3fn, axis=1)
    return values.contiguous(), scale.contiguous()


class Mxfp8LinearBackend(Enum):
    """What one MXFP8 linear layer runs on."""

    FLASHINFER_TRTLLM = "flashinfer_trtllm"
    FLASHINFER_CUTLASS = "flashinfer_cutlass"
    TRITON = "triton"
    BF16 = "bf16"

    def is_flashinfer_trtllm(self) -> bool:
        return self == Mxfp8LinearBackend.FLASHINFER_TRTLLM

    def is_flashinfer(self) -> bool:
        return self in (
            Mxfp8LinearBackend.FLASHINFER_TRTLLM,
            Mxfp8LinearBackend.FLASHINFER_CUTLASS,
        )

    def is_bf16(self) -> bool:
        return self == Mxfp8LinearBackend.BF16


@lru_cache(maxsize=1)
def mxfp8_kernels_available() -> bool:
    """Whether FlashInfer's MXFP8 GEMMs can run: SM100 or SM103, and FlashInfer 0.6.7."""
    if not is_flashinfer_available() or get_device_capability() not in (
        (10, 0),
        (10, 3),
    ):
        return False
    return Version(importlib.metadata.version("flashinfer_python")) >= Version("0.6.7")


def resolve_mxfp8_linear_backend() -> Mxfp8LinearBackend:
    """The backend that the server flag asks for, checked against this machine.

    `auto` keeps upstream's Triton kernel where it can run. Raises ValueError for a flag
    that has no MXFP8 linear, RuntimeError where this machine can run none.
    """
    flag = get_fp8_gemm_runner_backend()
    runnable = mxfp8_kernels_available() or envs.SGLANG_MXFP8_EMULATION.get()
    if flag.is_flashinfer_trtllm() or flag.is_flashinfer_cutlass():
        backend = Mxfp8LinearBackend(flag.value)
    elif flag.is_auto() or flag.is_triton():
        if is_cuda() and is_sm100_supported():
            return Mxfp8LinearBackend.TRITON
        runnable = runnable and flag.is_auto()
        backend = Mxfp8LinearBackend.FLASHINFER_TRTLLM
    else:
        raise ValueError(
            f"--fp8-gemm-backend={flag.value} has no MXFP8 linear; choose "
            "flashinfer_trtllm, flashinfer_cutlass, triton or auto."
        )
    if not runnable:
        raise _no_mxfp8_kernels(flag.value)
    return backend


def _no_mxfp8_kernels(flag: str) -> RuntimeError:
    device = torch.cuda.get_device_name() if is_cuda() else "a device without CUDA"
    return RuntimeError(
        f"--fp8-gemm-backend={flag} cannot serve an MXFP8 model on {device}: "
        "FlashInfer's MXFP8 GEMMs need an SM100 or SM103 GPU and flashinfer_python >= "
        "0.6.7. To run flashinfer_trtllm or flashinfer_cutlass without the kernels, "
        "slowly, set SGLANG_MXFP8_EMULATION=1."
    )


def _trtllm_refusal(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if dtype != torch.bfloat16:
        return f"trtllm writes bf16 only, not {dtype}"
    if k % 256 != 0:
        return f"K = {k} is not a multiple of 256 (trtllm)"
    return _cutlass_refusal(n, k, dtype)


def _cutlass_refusal(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} activations cannot be quantized"
    if n < 128 or k < 128:
        return f"[{n}, {k}] is smaller than 128 x 128"
    if n % 32 != 0:
        return f"N = {n} is not a multiple of 32"
    return None


def _triton_refusal(n: int, k: int, dtype: torch.dtype) -> Optional[str]:
    if n % 128 != 0 or k % 128 != 0:
        return f"[{n}, {k}] is not in multiples of 128 (triton)"
    return None


_REFUSALS = {
    Mxfp8LinearBackend.FLASHINFER_TRTLLM: _trtllm_refusal,
    Mxfp8LinearBackend.FLASHINFER_CUTLASS: _cutlass_refusal,
    Mxfp8LinearBackend.TRITON: _triton_refusal,
}
_FALLBACK = {
    Mxfp8LinearBackend.FLASHINFER_TRTLLM: Mxfp8LinearBackend.FLASHINFER_CUTLASS,
    Mxfp8LinearBackend.FLASHINFER_CUTLASS: Mxfp8LinearBackend.BF16,
    Mxfp8LinearBackend.TRITON: Mxfp8LinearBackend.BF16,
}


def select_mxfp8_linear_backend(
    preferred: Mxfp8LinearBackend, n: int, k: int, dtype: torch.dtype
) -> Tuple[Mxfp8LinearBackend, str]:
    """The backend for one layer's shard, and why it is not the preferred one ("" if it is).

    Args:
        n, k: output and input size of this rank's weight [N, K].
        dtype: the model's activation dtype.
    """
    backend, reasons = preferred, []
    while backend in _REFUSALS:
        reason = _REFUSALS[backend](n, k, dtype)
        if reason is None:
            break
        if reason not in reasons:
            reasons.append(reason)
        backend = _FALLBACK[backend]
    return backend, "; ".join(reasons)


def dispatch_w8a8_mxfp8_linear(backend: Mxfp8LinearBackend) -> Callable:
    """The function that runs a layer on `backend`.

    All take (input, weight, weight_scale, input_scale=None, bias=None).
    """
    if backend.is_flashinfer():
        kernel = backend.value.removeprefix("flashinfer_")
        return partial(flashinfer_mxfp8_blockscaled_linear, backend=kernel)
    return bf16_mxfp8_linear if backend.is_bf16() else triton_mxfp8_blockscaled_linear


def _register_mxfp8_op(fake_impl: Callable) -> Callable:
    """`register_custom_op`, and for the CPU too, where the op is emulated."""

    def register(function: Callable) -> Callable:
        op = register_custom_op(function, fake_impl=fake_impl)
        sglang_lib.impl(function.__name__, function, "CPU")
        return op

    return register


def _fake_mxfp8_quantize(
    input: torch.Tensor, use_8x4_sf_layout: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    m, k = input.shape
    row_tile = 8 if use_8x4_sf_layout else 128
    return (
        input.new_empty((m, k), dtype=torch.float8_e4m3fn),
        input.new_empty(
            (swizzled_scale_numel(m, k // GROUP_SIZE, row_tile),), dtype=torch.uint8
        ),
    )


@_register_mxfp8_op(_fake_mxfp8_quantize)
def flashinfer_mxfp8_quantize(
    input: torch.Tensor, use_8x4_sf_layout: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to MXFP8 with a swizzled scale.

    Args:
        input: bf16 or fp16 [M, K], K % 32 == 0.
        use_8x4_sf_layout: 8x4 scale layout instead of 128x4.

    Returns e4m3 [M, K] and the 1-D uint8 scale, padded to whole tiles.
    Source: `flashinfer.mxfp8_quantize`, 0.6.7.post3.
    """
    if not mxfp8_kernels_available():
        return mxfp8_emulation.mxfp8_quantize(input, use_8x4_sf_layout)
    from flashinfer import SfLayout, mxfp8_quantize

    layout = SfLayout.layout_8x4 if use_8x4_sf_layout else SfLayout.layout_128x4
    return mxfp8_quantize(input.contiguous(), sf_swizzle_layout=layout)


def _fake_mm_mxfp8(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    out_dtype: torch.dtype,
    use_8x4_sf_layout: bool,
    backend: str,
) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


@_register_mxfp8_op(_fake_mm_mxfp8)
def flashinfer_mm_mxfp8(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    out_dtype: torch.dtype,
    use_8x4_sf_layout: bool,
    backend: str,
) -> torch.Tensor:
    """Multiply two MXFP8 matrices with 1-D swizzled scales.

    Args:
        a: e4m3 [M, K]; a_descale: its scale, 8x4 if `use_8x4_sf_layout`, else 128x4.
        b: e4m3 [K, N], column-major, rows of N shuffled for "trtllm"; b_descale: 128x4.
        out_dtype: bf16, or fp16 with "cutlass".
        backend: "trtllm" or "cutlass".

    Returns [M, N] of `out_dtype`. Raises ValueError for shapes, dtypes and lengths that
    the backend refuses. Source: `flashinfer.mm_mxfp8`, 0.6.7.post3.
    """
    if mxfp8_kernels_available():
        from flashinfer import mm_mxfp8
    else:
        mm_mxfp8 = mxfp8_emulation.mm_mxfp8
    return mm_mxfp8(
        a,
        b,
        a_descale,
        b_descale,
        out_dtype=out_dtype,
        use_8x4_sf_layout=use_8x4_sf_layout,
        backend=backend,
    )


def _fake_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor],
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]), dtype=out_dtype)


@_register_mxfp8_op(_fake_mxfp8_linear)
def flashinfer_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor],
    out_dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """One MXFP8 linear as one op, opaque to torch.compile: quantize, then multiply.

    Takes the registered weight [N, K] and weight_scale [N, K/32] of a layer in kernel
    form, whose scale's padding lies in its storage beyond that view; see
    `flashinfer_mxfp8_blockscaled_linear` for the rest.
    """
    if input.shape[0] == 0:
        return input.new_empty((0, weight.shape[0]), dtype=out_dtype)
    if input_scale is None:
        values, scale = flashinfer_mxfp8_quantize(input, False)
    else:
        values = input
        scale = swizzle_scale(input_scale) if input_scale.dim() == 2 else input_scale
    return flashinfer_mm_mxfp8(
        values,
        weight.t(),
        scale,
        kernel_scale(weight_scale),
        out_dtype,
        False,
        backend,
    )


def flashinfer_mxfp8_blockscaled_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    *,
    backend: str,
) -> torch.Tensor:
    """input @ weight.T + bias in MXFP8, on FlashInfer's GEMM.

    Args:
        input: [..., K] bf16 or fp16; or e4m3 with `input_scale`.
        weight: e4m3 [N, K] in the backend's kernel form.
        weight_scale: uint8 [N, K/32], the view of its kernel form.
        input_scale: for pre-quantized input: uint8, [M, K/32] or 1-D 128x4.
        bias: [N], or None.
        backend: "trtllm" or "cutlass".

    Returns [..., N] in the input's dtype, bf16 for pre-quantized input.
    """
    input_2d = input.reshape(-1, input.shape[-1])
    out_dtype = input.dtype if input_scale is None else torch.bfloat16
    output = flashinfer_mxfp8_linear(
        input_2d, weight, weight_scale, input_scale, out_dtype, backend
    )
    if bias is not None:
        output += bias
    return output.view(*input.shape[:-1], weight.shape[0])


def _fake_bf16_linear(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@_register_mxfp8_op(_fake_bf16_linear)
def mxfp8_bf16_matmul(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """input @ weight.T with the bf16 copy behind an e4m3 weight [N, K]; opaque, since
    torch.compile must not see past the weight's view."""
    output = torch.nn.functional.linear(
        input.to(torch.bfloat16), dequantized_weight(weight)
    )
    return output.to(input.dtype)


def bf16_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """input @ weight.T + bias with the layer's dequantized weight; activations stay bf16.

    Args:
        input: [..., K] bf16 or fp16; or e4m3 [M, K] with `input_scale`.
        weight: e4m3 [N, K] of a layer whose kernel form is bf16.
        weight_scale: not read.
        input_scale: for pre-quantized input: uint8 [M, K/32].
        bias: [N], or None.

    Returns [..., N] in the input's dtype, bf16 for pre-quantized input.
    """
    if input_scale is not None:
        input = mxfp8_emulation.dequantize(input, input_scale).to(torch.bfloat16)
    output = mxfp8_bf16_matmul(input, weight)
    if bias is not None:
        output += bias
    return output
