"""A CPU in the place of an SM100 GPU, for MXFP8 linears where SGLANG_MXFP8_EMULATION is on.

sglang's own code runs as it is. What it asks of the GPU and of FlashInfer is replaced here,
by name: two facts, the swizzling of scales, the quantizer and the GEMM. Slow, and no
measure of speed.
"""

import logging
from functools import lru_cache
from typing import Optional, Tuple

import flashinfer
import torch

from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import emulation, numerics
from sglang.srt.layers.quantization.mxfp8.layout import swizzle_scale
from sglang.srt.runtime_context import PlatformContext

logger = logging.getLogger(__name__)


@lru_cache(maxsize=None)
def install() -> None:
    """Let this process emulate, unless it has the kernels; later calls do nothing."""
    if fp8_utils.get_platform().is_blackwell:
        return
    logger.info(
        "MXFP8 linears run on FlashInfer's kernels as emulated in torch, on "
        "flashinfer_cutlass where --fp8-gemm-backend is auto"
    )
    sm100 = PlatformContext()
    sm100._install(is_sm100=True, is_blackwell=True)
    fp8_utils.get_platform = lambda: sm100
    fp8_utils.is_flashinfer_available = lambda: True
    fp8_utils._raw_flashinfer_mm_mxfp8 = mm_mxfp8
    fp8_utils._raw_flashinfer_mxfp8_quantize = mxfp8_quantize
    fp8_utils.flashinfer_mm_mxfp8 = mm_mxfp8
    fp8_utils.flashinfer_mxfp8_quantize = mxfp8_quantize
    flashinfer.block_scale_interleave = swizzle_scale


def mm_mxfp8(*args, **kwargs) -> torch.Tensor:
    """`emulation.mm_mxfp8`."""
    return emulation.mm_mxfp8(*args, **kwargs)


# CuTe-DSL is not emulated, so that `auto` is CUTLASS.
mm_mxfp8.is_backend_supported = lambda backend, sm: backend in ("trtllm", "cutlass")


def mxfp8_quantize(
    input: torch.Tensor,
    is_sf_swizzled_layout: bool = True,
    sf_swizzle_layout: Optional[flashinfer.SfLayout] = None,
    **_,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [M, K] of bf16 or fp16, and its scale, 1-D 128x4 or 8x4, or [M * K // 32]."""
    if is_sf_swizzled_layout:
        is_8x4 = sf_swizzle_layout == flashinfer.SfLayout.layout_8x4
        return emulation.mxfp8_quantize(input.contiguous(), is_8x4)
    values, scale = numerics.quantize(input)
    return values, scale.flatten()
