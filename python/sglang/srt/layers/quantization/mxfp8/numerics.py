"""What MXFP8 bytes and numbers are, in plain torch."""

from typing import Tuple

import torch

GROUP_SIZE = 32  # elements along K that share one E8M0 scale
E4M3_MAX = 448.0
SMALLEST_NORMAL = 2.0**-126


def quantize(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Quantize [M, K] bf16/fp16/fp32 to MXFP8: e4m3 [M, K] and E8M0 uint8 [M, K/32].

    Rounds as FlashInfer's device code: the scale is amax / 448 rounded up to a power
    of two, subnormals are flushed to zero, NaN takes no part in amax unless the whole
    group is NaN, and a group with an infinity keeps byte 254 and no finite value.
    """
    m, k = x.shape
    if k % GROUP_SIZE != 0:
        raise ValueError(f"MXFP8 needs K % {GROUP_SIZE} == 0, got K = {k}")
    groups = x.float().reshape(m, k // GROUP_SIZE, GROUP_SIZE)
    groups = torch.where(groups.abs() < SMALLEST_NORMAL, groups * 0.0, groups)
    scale = _scale_byte(_amax(groups))
    values = groups * _reciprocal(scale).unsqueeze(-1)
    values = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.view(m, k), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantize e4m3 [N, K] with E8M0 uint8 [N, K/32] to fp32 [N, K]; byte 255 is NaN."""
    n, k = values.shape
    factor = _power_of_two(scale.to(torch.int32) - 127)
    factor = factor.masked_fill(scale == 255, float("nan"))
    groups = values.float().view(n, k // GROUP_SIZE, GROUP_SIZE)
    return (groups * factor.unsqueeze(-1)).view(n, k)


def _amax(groups: torch.Tensor) -> torch.Tensor:
    """Largest magnitude per group; NaN counts only where a whole group is NaN."""
    magnitude = groups.abs()
    nan = magnitude.isnan()
    amax = magnitude.masked_fill(nan, 0.0).amax(dim=-1)
    return amax.masked_fill(nan.all(dim=-1), float("nan"))


def _scale_byte(amax: torch.Tensor) -> torch.Tensor:
    """E8M0 byte of amax / 448, rounded up; subnormal gives 0, inf 254, NaN 255."""
    quotient = amax * torch.tensor(1.0 / E4M3_MAX, dtype=torch.float32)
    bits = quotient.view(torch.int32)
    byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    byte = byte.clamp(max=254).masked_fill(quotient < SMALLEST_NORMAL, 0)
    return byte.masked_fill(quotient.isnan(), 255).to(torch.uint8)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """1 / 2^(scale - 127) in fp32 with flush to zero: 0 for bytes 0 and 254."""
    exponent = 127 - scale.to(torch.int32)
    reciprocal = _power_of_two(exponent)
    reciprocal = reciprocal.masked_fill((scale == 0) | (scale == 254), 0.0)
    return reciprocal.masked_fill(scale == 255, float("nan"))
