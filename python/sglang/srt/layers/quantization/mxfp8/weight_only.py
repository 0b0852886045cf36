"""x @ W^T for 16-bit x and an MXFP8 weight as its checkpoint has it (W8A16).

Nothing is prepared and no second copy is kept. For few rows of x the weight is decoded
in the product (a Triton kernel); for many, slab by slab into torch's own. Without a
CUDA GPU, everything is plain torch.

What a weight is, of a code's value v and its scale byte s:
- bf16 input: v * 2^(s - 127) rounded to bf16, which is exact for s = 3 to 246. Above,
  what bf16 cannot hold is infinite; below, it is rounded to bf16's subnormals.
- fp16 input: the same rounded to fp16, exact for s = 112 to 134. Below 95 it may be 0;
  from 135 on, which is beyond fp16, it is infinite or NaN.
- 16-bit input of one row on a GPU, of 2 with N up to 16384, or of up to 4 with a small
  weight: not rounded, for the scale goes onto the fp32 sum of its group.
- s = 255 and the NaN codes are NaN, for every input.
"""

import torch

from sglang.srt.layers.quantization.mxfp8.numerics import dequantize

MAX_SLAB_BYTES = 64 << 20  # of decoded weight


def weight_only_linear(
    input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, max_m_fused: int
) -> torch.Tensor:
    """[M, N] = input @ decoded weight^T, in the input's dtype.

    Args:
        input: [M, K] bf16, fp16 or fp32; as of the others, only K need be contiguous.
        weight: e4m3 [N, K], K % 32 == 0.
        scale: E8M0 uint8 [N, K/32].
        max_m_fused: on a CUDA GPU, up to this M 16-bit input takes the kernel that
            decodes in the product.
    """
    m, n = input.shape[0], weight.shape[0]
    is_16_bit = input.dtype in (torch.bfloat16, torch.float16)
    if not (input.is_cuda and torch.version.hip is None and is_16_bit and m and n):
        return _by_slabs(input, weight, scale, _decode)
    from sglang.srt.layers.quantization.mxfp8 import weight_only_kernel as kernel

    with torch.cuda.device(input.device):
        if m <= max_m_fused:
            return kernel.fused(input, weight, scale)
        return _by_slabs(input, weight, scale, kernel.decode_into)


def max_m_fused(n: int, k: int) -> int:
    """The M up to which a weight [N, K] is better decoded in the product, on an H100."""
    if n * k < 16 << 20:
        return 128
    return 512 if n * k >= 32 << 20 else 256


def _by_slabs(input, weight, scale, decode) -> torch.Tensor:
    n, k = weight.shape
    output = input.new_empty(input.shape[0], n)
    # Many rows of x fill the GPU with smaller slabs, which stay in the L2 cache. Powers of
    # two are whole tiles of torch's product.
    size = MAX_SLAB_BYTES // (2 if input.shape[0] > 1024 else 1)
    rows = max(64, 1 << (size // (k * input.element_size())).bit_length() >> 1)
    workspace = input.new_empty(min(rows, n), k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        slab = workspace[: len(weight[part])]
        decode(slab, weight[part], scale[part])
        torch.mm(input, slab.t(), out=output[:, part])
    return output


def _decode(out: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
    out.copy_(dequantize(weight, scale))
