"""
Mxfp8DenseGemmBackend, select_mxfp8_dense_gemm_backend, mxfp8_dense_gemm_fallbacks, mxfp8_linear_of, weight_only_mxfp8_linear, weight_only_mxfp8_matmul
    why: a kernel that does not take a layer's shape or dtype fails at load or in the first forward

flashinfer_mxfp8_blockscaled_linear
    why: a rank of data parallelism may have no tokens, and FlashInfer has no kernel for M = 0
"""

import logging
from enum import Enum
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Callable, List, Optional

import torch
from overlay.marks import prepend

from sglang.srt.layers.quantization.mxfp8 import shapes

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8_utils import (
        _raw_flashinfer_mm_mxfp8,
        get_device_sm,
        get_platform,
        is_flashinfer_available,
    )

logger = logging.getLogger(__name__)


class Mxfp8DenseGemmBackend(Enum):
    # The weight is decoded in every call: for what no kernel takes.
    WEIGHT_ONLY = "weight_only"

    def is_weight_only(self) -> bool:
        return self == Mxfp8DenseGemmBackend.WEIGHT_ONLY


@lru_cache(maxsize=None)  # so that each shape is logged once
def select_mxfp8_dense_gemm_backend(
    preferred: Mxfp8DenseGemmBackend, n: int, k: int, dtype: torch.dtype
) -> Mxfp8DenseGemmBackend:
    """The server's backend for a weight [N, K], or the first other one that takes it.

    `dtype` is that of the activations.
    """
    reasons = []
    for backend in dict.fromkeys([preferred, *mxfp8_dense_gemm_fallbacks()]):
        reason = shapes.refusal(backend.value, n, k, dtype)
        if reason is None:
            break
        reasons.append(reason)
    if reasons:
        told = "; ".join(dict.fromkeys(reasons))
        logger.info(f"MXFP8 linears [{n}, {k}] run on {backend.value}: {told}")
    return backend


def mxfp8_dense_gemm_fallbacks() -> List[Mxfp8DenseGemmBackend]:
    """What runs here without --fp8-gemm-backend, in that order; the last takes any layer."""
    found = [Mxfp8DenseGemmBackend.WEIGHT_ONLY]
    if get_platform().is_blackwell and is_flashinfer_available():
        found.insert(0, Mxfp8DenseGemmBackend.FLASHINFER_CUTLASS)
        if _raw_flashinfer_mm_mxfp8.is_backend_supported("cute-dsl", get_device_sm()):
            found.insert(0, Mxfp8DenseGemmBackend.FLASHINFER_CUTEDSL)
    return found


def mxfp8_linear_of(backend: Mxfp8DenseGemmBackend) -> Callable:
    """The function of a layer that is not on the server's backend."""
    if backend.is_weight_only():
        return weight_only_mxfp8_linear
    name = "cute-dsl" if backend.is_flashinfer_cutedsl() else "cutlass"
    return partial(flashinfer_mxfp8_blockscaled_linear, backend=name)


def weight_only_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    **_,
) -> torch.Tensor:
    """Product [..., K] -> [..., N] in the input's dtype with an MXFP8 weight [N, K].

    `weight_scale` is the checkpoint's, [N, K // 32] bytes. Raises ValueError for an input
    that is quantized already.
    """
    if input_scale is not None:
        raise ValueError("A weight-only MXFP8 linear takes no quantized input")
    x = input.reshape(-1, input.shape[-1])
    output = weight_only_mxfp8_matmul(x, weight, weight_scale)
    if bias is not None:
        output += bias
    return output.view(*input.shape[:-1], weight.shape[0])


def weight_only_mxfp8_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`weight_only_mxfp8_linear` for x [M, K]."""
    from sglang.srt.layers.quantization.mxfp8_block_convert import (
        dequant_mxfp8_2d_to_bf16,
    )

    return x @ dequant_mxfp8_2d_to_bf16(weight, weight_scale).to(x.dtype).t()


@prepend
def flashinfer_mxfp8_blockscaled_linear(input, weight, output_dtype):
    if input.numel() == 0:
        is_float = input.dtype in (torch.float16, torch.bfloat16, torch.float32)
        dtype = output_dtype or (input.dtype if is_float else torch.bfloat16)
        return input.new_empty(*input.shape[:-1], weight.shape[0], dtype=dtype)
