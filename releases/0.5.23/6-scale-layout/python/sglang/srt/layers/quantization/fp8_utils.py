"""
trtllm_mxfp8_linear_of, trtllm_mxfp8_linear, trtllm_mxfp8_8x4, trtllm_mxfp8_8x4_matmul
    why: with few rows and a narrow weight trtllm is faster on 8x4 activation scales
"""

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Callable, Optional

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.mxfp8 import scale_layout
from sglang.srt.utils.common import get_device_name
from sglang.srt.utils.custom_op import register_custom_op

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8_utils import (
        _raw_flashinfer_mm_mxfp8,
        _raw_flashinfer_mxfp8_quantize,
        flashinfer_mxfp8_blockscaled_linear,
        logger,
    )


@lru_cache(maxsize=None)  # so that each shape is logged once
def trtllm_mxfp8_linear_of(n: int, k: int) -> Callable:
    """trtllm's function for a weight [N, K].

    Raises ValueError for a SGLANG_MXFP8_TRTLLM_SF_LAYOUT that is none.
    """
    layout = envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.get()
    tuned = scale_layout.tuned_layers(
        envs.SGLANG_MXFP8_CONFIG_DIR.get() or scale_layout.CONFIG_DIR,
        get_device_name() or "cpu",
        scale_layout.flashinfer_version(),
    )
    max_m = scale_layout.max_m_8x4(
        n, scale_layout.parse_sf_layout(layout), tuned.get((n, k))
    )
    if max_m:
        up_to = "" if max_m == scale_layout.ANY_M else f" up to M = {max_m}"
        logger.info(f"MXFP8 linears [{n}, {k}] have 8x4 activation scales{up_to}")
    return partial(trtllm_mxfp8_linear, max_m_8x4=max_m)


def trtllm_mxfp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    max_m_8x4: int = 0,
    pin_tactic: bool = False,
) -> torch.Tensor:
    """`flashinfer_mxfp8_blockscaled_linear` on trtllm: [..., K] -> [..., N].

    The activation scales are 8x4 for M <= max_m_8x4. They are 128x4 for more rows, for
    an input that is quantized already, and with `pin_tactic`, by which a row's result does
    not depend on M. weight is e4m3 [N, K], weight_scale in trtllm's form.
    """
    k = input.shape[-1]
    m = input.numel() // k
    is_8x4 = 0 < m <= max_m_8x4 and input.dtype == torch.bfloat16 and not pin_tactic
    if input_scale is not None or not is_8x4:
        return flashinfer_mxfp8_blockscaled_linear(
            input,
            weight,
            weight_scale,
            input_scale,
            bias,
            backend="trtllm",
            pin_tactic=pin_tactic,
        )
    run = trtllm_mxfp8_8x4_matmul if input.is_cuda else trtllm_mxfp8_8x4
    output = run(input.reshape(m, k), weight, weight_scale.view(-1))
    if bias is not None:
        output += bias
    return output.view(*input.shape[:-1], weight.shape[0])


def trtllm_mxfp8_8x4(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """bf16 [M, N] of x bf16 [M, K], whose scales become 8x4, and trtllm's weight."""
    from flashinfer import SfLayout
    from flashinfer.autotuner import autotune

    values, scale = _raw_flashinfer_mxfp8_quantize(
        x, alignment=32, backend="cute-dsl", sf_swizzle_layout=SfLayout.layout_8x4
    )
    # The tuner makes and caches what it measures for 128x4.
    with autotune(False, skip_ops={"mxfp8_gemm"}):
        return _raw_flashinfer_mm_mxfp8(
            values,
            weight.t(),
            scale,
            weight_scale,
            out_dtype=torch.bfloat16,
            use_8x4_sf_layout=True,
            backend="trtllm",
        )


@register_custom_op(
    mutates_args=[],
    fake_impl=lambda x, weight, weight_scale: x.new_empty(x.shape[0], weight.shape[0]),
)
def trtllm_mxfp8_8x4_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """`trtllm_mxfp8_8x4` as one op: opaque to torch.compile."""
    return trtllm_mxfp8_8x4(x, weight, weight_scale)
