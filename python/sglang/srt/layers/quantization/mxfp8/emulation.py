"""What FlashInfer's MXFP8 kernels compute, in pure torch: an executable contract.

A stand-in for hardware that is missing, used only when SGLANG_MXFP8_EMULATION is on.
It decodes exactly the bytes that FlashInfer would be given, in the kernels' layouts,
and refuses what `flashinfer.mm_mxfp8` refuses. Slow, and no measure of speed.

Sources: FlashInfer 0.6.7.post3, `cvt_warp_fp16_to_mxfp8` (rounding),
`_check_mm_mxfp8_problem_size`, `_trtllm_gemm_mxfp8_requirement` and
`mxfp8_gemm_cutlass.cu` (refusals).
"""

from typing import Tuple

import torch

from sglang.srt.layers.quantization.mxfp8.layout import (
    swizzle_scale,
    unshuffle_rows,
    unswizzle_scale,
)
from sglang.srt.layers.quantization.mxfp8.numerics import (
    GROUP_SIZE,
    dequantize,
    quantize,
)

MIN_N = MIN_K = 128
TRTLLM_K_MULTIPLE = 256
CUTLASS_MULTIPLE = 32


def mxfp8_quantize(
    x: torch.Tensor, use_8x4_sf_layout: bool = False
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Quantize [M, K] as `flashinfer.mxfp8_quantize` does, with a swizzled 1-D scale.

    The scale has the 128x4 layout, or 8x4 if asked; its padding is zero bytes.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"mxfp8_quantize takes bf16 or fp16, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError("mxfp8_quantize: the input must be contiguous")
    values, scale = quantize(x)
    return values, swizzle_scale(scale, 8 if use_8x4_sf_layout else 128)


def mm_mxfp8(
    a: torch.Tensor,
    b: torch.Tensor,
    a_descale: torch.Tensor,
    b_descale: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    use_8x4_sf_layout: bool = False,
    backend: str = "trtllm",
) -> torch.Tensor:
    """Multiply as `flashinfer.mm_mxfp8` does, accumulating in fp32.

    Args:
        a: e4m3 [M, K].
        b: e4m3 [K, N], column-major; its rows of N are shuffled for "trtllm".
        a_descale: uint8, 1-D, 128x4 or 8x4 layout.
        b_descale: uint8, 1-D, 128x4 layout of the (shuffled, for "trtllm") weight rows.
        out_dtype: bf16, or fp16 for "cutlass".
        backend: "trtllm" or "cutlass".

    Returns [M, N] of `out_dtype`. Raises ValueError where FlashInfer would.
    """
    _check_problem(a, b, a_descale, b_descale, out_dtype, use_8x4_sf_layout, backend)
    (m, k), n = a.shape, b.shape[1]
    weight = b.t()
    weight_scale = unswizzle_scale(b_descale, n, k // GROUP_SIZE)
    if backend == "trtllm":
        weight, weight_scale = (
            unshuffle_rows(weight.view(torch.uint8)).view(weight.dtype),
            unshuffle_rows(weight_scale),
        )
    scale = unswizzle_scale(
        a_descale, m, k // GROUP_SIZE, 8 if use_8x4_sf_layout else 128
    )
    product = dequantize(a, scale) @ dequantize(weight, weight_scale).t()
    return product.to(out_dtype)


def _check_problem(
    a, b, a_descale, b_descale, out_dtype, use_8x4_sf_layout, backend
) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"mm_mxfp8 takes [M, K] and [K, N], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    (m, k), n = a.shape, b.shape[1]
    if n < MIN_N or k < MIN_K:
        raise ValueError(f"mm_mxfp8 needs N and K of at least 128, got {n=} and {k=}")
    for name, tensor, dtype in (
        ("a", a, torch.float8_e4m3fn),
        ("b", b, torch.float8_e4m3fn),
        ("a_descale", a_descale, torch.uint8),
        ("b_descale", b_descale, torch.uint8),
    ):
        if tensor.dtype != dtype:
            raise ValueError(f"mm_mxfp8: {name} must be {dtype}, got {tensor.dtype}")
    if not b.t().is_contiguous():
        raise ValueError("mm_mxfp8: b must be column-major, pass weight.t()")
    if not (a.is_contiguous() and a_descale.is_contiguous()):
        raise ValueError("mm_mxfp8: a and its scale must be contiguous")
    _check_scale_lengths(a_descale, b_descale, m, n, k, use_8x4_sf_layout)
    _CHECKS[backend](n, k, out_dtype, use_8x4_sf_layout)


def _check_scale_lengths(a_descale, b_descale, m, n, k, use_8x4_sf_layout) -> None:
    # FlashInfer measures both scales with the row tile of `a`, although b's is 128x4.
    row_tile = 8 if use_8x4_sf_layout else 128
    for name, scale, rows in (("a_descale", a_descale, m), ("b_descale", b_descale, n)):
        groups = -(-k // 128) * 4
        expected = -(-rows // row_tile) * row_tile * groups
        if scale.ndim != 1 or scale.numel() != expected:
            raise ValueError(
                f"mm_mxfp8: {name} must be 1-D with {expected} bytes in the "
                f"{row_tile}x4 layout, got shape {tuple(scale.shape)}"
            )


def _check_trtllm(n, k, out_dtype, use_8x4_sf_layout) -> None:
    if out_dtype != torch.bfloat16:
        raise ValueError(f"mm_mxfp8: trtllm writes bf16 only, got {out_dtype}")
    if k % TRTLLM_K_MULTIPLE != 0:
        raise ValueError(f"mm_mxfp8: trtllm needs K % 256 == 0, got {k=}")
    if n % 32 != 0:
        raise ValueError(f"mm_mxfp8: a trtllm weight needs N % 32 == 0, got {n=}")


def _check_cutlass(n, k, out_dtype, use_8x4_sf_layout) -> None:
    if out_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"mm_mxfp8: cutlass writes bf16 or fp16, got {out_dtype}")
    if n % CUTLASS_MULTIPLE != 0 or k % CUTLASS_MULTIPLE != 0:
        raise ValueError(
            f"mm_mxfp8: cutlass needs N % 32 == 0 and K % 32 == 0, got {n=} and {k=}"
        )
    if use_8x4_sf_layout:
        raise ValueError("mm_mxfp8: cutlass reads the 128x4 scale layout only")


_CHECKS = {"trtllm": _check_trtllm, "cutlass": _check_cutlass}
