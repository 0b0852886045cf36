"""x @ W^T for 16-bit x and an MXFP8 weight as its checkpoint has it (W8A16).

Nothing is prepared and no second copy is kept. For few rows of x the weight is decoded
in the product; for many, slab by slab into torch's own.
"""

import torch

from sglang.srt.layers.quantization.mxfp8.numerics import dequantize

MAX_SLAB_BYTES = 16 << 20  # of decoded weight: stays in the L2 cache


def weight_only_linear(
    input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, max_m_fused: int
) -> torch.Tensor:
    """[M, N] = input @ decoded weight^T, in the input's dtype.

    Args:
        input: [M, K] bf16, fp16 or fp32; as for the others, only K is contiguous.
        weight: e4m3 [N, K], K % 32 == 0.
        scale: E8M0 uint8 [N, K/32].
        max_m_fused: on a CUDA GPU, up to this M 16-bit input takes the Triton kernel,
            which needs no workspace for the weight.
    """
    return _by_slabs(input, weight, scale)


def _by_slabs(
    input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    n, k = weight.shape
    output = input.new_empty(input.shape[0], n)
    rows = max(1, MAX_SLAB_BYTES // (k * input.element_size()))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        slab = dequantize(weight[part], scale[part]).to(input.dtype)
        torch.mm(input, slab.t(), out=output[:, part])
    return output
