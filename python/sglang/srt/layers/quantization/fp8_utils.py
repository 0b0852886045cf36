"""
Fp8GemmRunnerBackend
    why: --fp8-gemm-backend flashinfer_cutlass
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later

_dispatch_explicit_backend
    why: flashinfer_cutlass has no block-FP8 kernel; say so instead of "unknown"
    until: the base is 0.5.10 or later

_get_triton_mxfp8_downcast, mxfp8_group_quantize, _triton_downcast
    why: MXFP8 must not depend on triton_kernels, which ships inside sgl-kernel
    until: upstream's quantizer has no such dependency

dispatch_w8a8_mxfp8_linear, flashinfer_mxfp8_blockscaled_linear, flashinfer_mxfp8_linear, _register_mxfp8_op, _run_2d
    why: MXFP8 dense linears on FlashInfer's trtllm and cutlass GEMMs
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later

flashinfer_mxfp8_quantize, flashinfer_mm_mxfp8, _kernels
    why: the two halves of the linear, on FlashInfer's kernels or their emulation
    thread: sgl-project/sglang#21576
    until: the base is 0.5.10 or later

_without_autotuning
    why: a MoE flag switches FlashInfer's tuning on for every GEMM; this one must not be tuned
    thread: sgl-project/sglang#29669
    until: FlashInfer is 0.6.14 or later, and its tuning knows the 8x4 layout

triton_mxfp8_linear, _linear_scale, _quantized_input
    why: upstream's Triton linear takes no empty batch, no swizzled scale, and is no op
    until: the base is 0.5.10 or later

weight_only_mxfp8_linear
    why: GPUs without MXFP8 products, and layers that no such kernel takes
    thread: sgl-project/sglang#28852
    until: upstream has a weight-only MXFP8 kernel
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Callable, Optional, Tuple

import torch
from overlay.marks import drop, prepend
from packaging.version import Version

from sglang.srt.layers.quantization.mxfp8 import emulation, numerics
from sglang.srt.layers.quantization.mxfp8.layout import (
    swizzle_scale,
    swizzled_scale_numel,
    unswizzle_scale,
)
from sglang.srt.layers.quantization.mxfp8.numerics import GROUP_SIZE
from sglang.srt.layers.quantization.mxfp8.routing import (
    Mxfp8LinearBackend,
    Mxfp8LinearChoice,
    mxfp8_kernels_missing,
)
from sglang.srt.layers.quantization.mxfp8.scale_layout import flashinfer_version
from sglang.srt.layers.quantization.mxfp8.weight_only import weight_only_linear
from sglang.srt.layers.quantization.mxfp8.weights import kernel_scale
from sglang.srt.utils.common import sglang_lib
from sglang.srt.utils.custom_op import register_custom_op

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8_utils import (
        logger,
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
    downcast = _triton_downcast() if x.is_cuda else None
    if downcast is None:
        return numerics.quantize(x)
    values, scale = downcast(x.contiguous(), torch.float8_e4m3fn, axis=1)
    return values.contiguous(), scale.contiguous()


@lru_cache(maxsize=None)
def _triton_downcast() -> Optional[Callable]:
    """The Triton quantizer of triton_kernels; None, with one warning, without it."""
    try:
        from triton_kernels.numerics_details.mxfp import downcast_to_mxfp
    except Exception as error:  # also of one for another Triton
        logger.warning(
            "MXFP8 is quantized in plain torch, slowly: "
            f"triton_kernels cannot be imported ({error}). sgl-kernel brings it."
        )
        return None
    return downcast_to_mxfp


def dispatch_w8a8_mxfp8_linear(choice: Mxfp8LinearChoice) -> Callable:
    """The function that runs a layer of this choice.

    All take (input, weight, weight_scale, input_scale=None, bias=None):
    input [..., K] bf16 or fp16, or e4m3 with input_scale, uint8 [M, K/32] or 1-D 128x4;
    weight e4m3 [N, K] and weight_scale uint8 [N, K/32] in the backend's kernel form;
    bias [N]. All return [..., N] in the input's dtype, bf16 for e4m3 input.
    """
    if choice.backend.is_flashinfer():
        return partial(
            flashinfer_mxfp8_blockscaled_linear,
            backend=choice.backend.value.removeprefix("flashinfer_"),
            max_m_8x4=choice.max_m_8x4,
        )
    if choice.backend.is_triton():
        return partial(_run_2d, triton_mxfp8_linear)
    settings = (choice.max_m_fused,)
    return partial(_run_2d, weight_only_mxfp8_linear, settings=settings)


def _run_2d(
    linear: Callable,
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    settings: tuple = (),
) -> torch.Tensor:
    is_2d = input.dim() == 2
    output = linear(
        input if is_2d else input.reshape(-1, input.shape[-1]),
        weight,
        weight_scale,
        input_scale,
        input.dtype if input_scale is None else torch.bfloat16,
        *settings,
    )
    if bias is not None:
        output += bias
    return output if is_2d else output.view(*input.shape[:-1], output.shape[-1])


def _fake_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor],
    out_dtype: torch.dtype,
    *settings,
) -> torch.Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]), dtype=out_dtype)


def _register_mxfp8_op(fake_impl: Callable) -> Callable:
    """`register_custom_op`, and for the CPU too, where the op is emulated.

    Only a compiler gets the op: its dispatch costs more host time than all of ours.
    """

    def register(function: Callable) -> Callable:
        op = register_custom_op(function, fake_impl=fake_impl)
        sglang_lib.impl(function.__name__, function, "CPU")

        @wraps(function)
        def call(*args):
            return (op if torch.compiler.is_compiling() else function)(*args)

        return call

    return register


@lru_cache(maxsize=None)
def _kernels(backend: str) -> Tuple[Callable, Callable]:
    """FlashInfer's quantizer and GEMM, or their emulation, with the same signatures."""
    if mxfp8_kernels_missing(Mxfp8LinearBackend(f"flashinfer_{backend}")):
        return emulation.mxfp8_quantize, emulation.mm_mxfp8
    from flashinfer import SfLayout, mm_mxfp8, mxfp8_quantize
    from flashinfer.autotuner import AutoTuner

    layouts = SfLayout.layout_128x4, SfLayout.layout_8x4

    def quantize(input: torch.Tensor, use_8x4_sf_layout: bool):
        return mxfp8_quantize(input, sf_swizzle_layout=layouts[use_8x4_sf_layout])

    return quantize, _without_autotuning(mm_mxfp8, AutoTuner.get())


def _without_autotuning(mm_mxfp8: Callable, tuner) -> Callable:
    """`mm_mxfp8`, with FlashInfer's autotuner off while it runs.

    Tuning it reads illegal memory before FlashInfer 0.6.14 (sgl-project/sglang#29669), and
    assumes 128x4 activation scales. A nested `autotune(False)` does not stop it.
    """
    old = Version(flashinfer_version()) < Version("0.6.14")

    def run(*args, use_8x4_sf_layout: bool, **kwargs):
        tuning = tuner.is_tuning_mode and (old or use_8x4_sf_layout)
        if tuning:
            _say_not_tuned()
            tuner.is_tuning_mode = False
        try:
            return mm_mxfp8(*args, use_8x4_sf_layout=use_8x4_sf_layout, **kwargs)
        finally:
            if tuning:
                tuner.is_tuning_mode = True

    return run


@lru_cache(maxsize=None)
def _say_not_tuned() -> None:
    logger.info(
        "FlashInfer's autotuner passes over MXFP8 linear layers: before 0.6.14 it reads "
        f"illegal memory there (this is {flashinfer_version()}), and it does not know "
        "the 8x4 layout."
    )


def flashinfer_mxfp8_quantize(
    input: torch.Tensor, use_8x4_sf_layout: bool = False
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations to MXFP8 with a swizzled scale.

    Args:
        input: bf16 or fp16 [M, K], K % 32 == 0.
        use_8x4_sf_layout: 8x4 scale layout instead of 128x4.

    Returns e4m3 [M, K] and the 1-D uint8 scale, padded to whole tiles.
    Source: `flashinfer.mxfp8_quantize`, 0.6.7.post3.
    """
    return _kernels("cutlass")[0](input.contiguous(), use_8x4_sf_layout)


def flashinfer_mm_mxfp8(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply two MXFP8 matrices with 1-D swizzled scales.

    Args:
        a: e4m3 [M, K]; a_descale: its scale, 8x4 if `use_8x4_sf_layout`, else 128x4.
        b: e4m3 [K, N], column-major, rows of N shuffled for "trtllm"; b_descale: 128x4.
        out_dtype: bf16, or fp16 with "cutlass".
        backend: "trtllm", "cutlass", or "auto", which is cutlass as in FlashInfer.

    Returns [M, N] of `out_dtype`. Raises ValueError for shapes, dtypes and lengths that
    the backend refuses. Source: `flashinfer.mm_mxfp8`, 0.6.7.post3.
    """
    backend = "cutlass" if backend == "auto" else backend
    return _kernels(backend)[1](
        a,
        b,
        a_descale,
        b_descale,
        out_dtype=out_dtype,
        use_8x4_sf_layout=use_8x4_sf_layout,
        backend=backend,
    )


@_register_mxfp8_op(_fake_linear)
def flashinfer_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor],
    out_dtype: torch.dtype,
    backend: str,
    max_m_8x4: int,
) -> torch.Tensor:
    """One MXFP8 linear as one op, opaque to torch.compile: choose the layout of the
    activation scale, quantize, multiply.

    Takes input [M, K]; see `flashinfer_mxfp8_blockscaled_linear` for the rest.
    """
    m = input.shape[0]
    if m == 0:
        return input.new_empty((0, weight.shape[0]), dtype=out_dtype)
    use_8x4 = m <= max_m_8x4
    if input_scale is None:
        input, input_scale = flashinfer_mxfp8_quantize(input, use_8x4)
    else:
        input, input_scale = _quantized_input(input, input_scale)
        if input_scale.dim() == 2:
            input_scale = swizzle_scale(input_scale, 8 if use_8x4 else 128)
        else:
            use_8x4 = False
    return flashinfer_mm_mxfp8(
        input,
        weight.t(),
        input_scale,
        kernel_scale(weight_scale),
        out_dtype=out_dtype,
        use_8x4_sf_layout=use_8x4,
        backend=backend,
    )


def flashinfer_mxfp8_blockscaled_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    *,
    backend: str,
    max_m_8x4: int = 0,
) -> torch.Tensor:
    """input @ weight.T + bias in MXFP8, on FlashInfer's GEMM.

    Args:
        input: [..., K] bf16 or fp16; or e4m3 with `input_scale`.
        weight: e4m3 [N, K] in the backend's kernel form.
        weight_scale: uint8 [N, K/32], the view of its kernel form, whose padding lies in
            the storage beyond it.
        input_scale: for pre-quantized input: uint8, [M, K/32] or 1-D 128x4.
        bias: [N], or None.
        backend: "trtllm" or "cutlass".
        max_m_8x4: the largest M for which the activation scale is laid out 8x4.

    Returns [..., N] in the input's dtype, bf16 for pre-quantized input.
    """
    settings = backend, max_m_8x4
    return _run_2d(
        flashinfer_mxfp8_linear,
        input,
        weight,
        weight_scale,
        input_scale,
        bias,
        settings,
    )


def _quantized_input(
    input: torch.Tensor, scale: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Input that came quantized, as the kernels take it: e4m3 [M, K] and its scale, uint8
    [M, K/32] or 1-D 128x4. Raises ValueError for a scale of another shape or dtype."""
    m, groups = input.shape[0], input.shape[1] // GROUP_SIZE
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if scale.dim() > 2:
        scale = scale.reshape(-1, scale.shape[-1])
    is_linear = scale.shape == (m, groups)
    is_swizzled = scale.shape == (swizzled_scale_numel(m, groups),)
    if scale.dtype != torch.uint8 or not (is_linear or is_swizzled):
        raise ValueError(
            f"the scale of MXFP8 input {list(input.shape)} must be uint8 [{m}, {groups}] "
            f"or 1-D in the 128x4 layout, got {scale.dtype} {list(scale.shape)}"
        )
    return input.contiguous(), scale.contiguous()


def _linear_scale(input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The [M, K/32] scale of quantized input whose scale may be 1-D 128x4."""
    m, k = input.shape
    return scale if scale.dim() == 2 else unswizzle_scale(scale, m, k // GROUP_SIZE)


@_register_mxfp8_op(_fake_linear)
def triton_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """[M, K] @ [N, K].T on upstream's Triton kernel, as one op."""
    if input.shape[0] == 0:
        return input.new_empty((0, weight.shape[0]), dtype=out_dtype)
    if input_scale is not None:
        input, input_scale = _quantized_input(input, input_scale)
        input_scale = _linear_scale(input, input_scale)
    return triton_mxfp8_blockscaled_linear(
        input.contiguous(), weight, weight_scale, input_scale, output_dtype=out_dtype
    )


@_register_mxfp8_op(_fake_linear)
def weight_only_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor],
    out_dtype: torch.dtype,
    max_m_fused: int,
) -> torch.Tensor:
    """[M, K] @ [N, K].T, the weight as its checkpoint has it, activations in 16 bits."""
    if input_scale is not None:
        input, scale = _quantized_input(input, input_scale)
        input = numerics.dequantize(input, _linear_scale(input, scale)).to(out_dtype)
    return weight_only_linear(input, weight, weight_scale, max_m_fused)
