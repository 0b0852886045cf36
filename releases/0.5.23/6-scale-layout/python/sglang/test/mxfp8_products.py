"""Plain torch in the place of FlashInfer's MXFP8 quantizer and product. Each scale is read in
the layout that the caller names, so that a wrong one gives a wrong product."""

from typing import Optional, Tuple

import flashinfer
import torch

from sglang.srt.layers.quantization.mxfp8 import layout, numerics


def mxfp8_quantize(
    input: torch.Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    backend: str = "cuda",
    sf_swizzle_layout: Optional[flashinfer.SfLayout] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    values, scale = numerics.quantize(input)
    is_8x4 = sf_swizzle_layout == flashinfer.SfLayout.layout_8x4
    return values, layout.swizzle_scale(scale, 8 if is_8x4 else 128)


def mm_mxfp8(a, b, a_scale, b_scale, out_dtype, use_8x4_sf_layout=False, backend=""):
    """[M, N] of e4m3 a [M, K] and b [K, N] and their 1-D scales, in `out_dtype`."""
    (m, k), n, tile = a.shape, b.shape[1], 8 if use_8x4_sf_layout else 128
    is_shuffled = backend == "trtllm"
    a_scale = layout.unswizzle_scale(a_scale, m, k // 32, tile)
    b_scale = layout.unswizzle_scale(b_scale, n, k // 32, shuffle=is_shuffled)
    weight = layout.unshuffle_rows(b.t()) if is_shuffled else b.t()
    product = numerics.dequantize(a, a_scale) @ numerics.dequantize(weight, b_scale).T
    return product.to(out_dtype)


def through_mxfp8(x: torch.Tensor) -> torch.Tensor:
    """fp32 [M, K]: what is left of x when it has been quantized."""
    return numerics.dequantize(*numerics.quantize(x))
