"""MXFP8 quantization against a library that is not ours.

FlashInfer's own host quantizer and shuffles need nvcc and a GPU: they were compared once,
on an H200.
"""

import unittest

import torch
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="default")


def groups_of_every_amax() -> torch.Tensor:
    """[.., 32] fp32 groups whose largest magnitudes are all bf16 values from 2^-100 to
    2^127, with random smaller neighbours of either sign."""
    bits = torch.arange(((127 - 100) << 7), (255 << 7), dtype=torch.int32)
    amax = bits.to(torch.int16).view(torch.bfloat16).float()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(len(amax), 32, generator=generator) * 2 - 1
    x = (x * amax[:, None]).bfloat16().float()
    place = torch.randint(32, (len(amax),), generator=generator)
    x[torch.arange(len(amax)), place] = amax
    return x


class TestTorchao(CustomTestCase):
    """torchao rounds a scale from amax / 256, FlashInfer up from amax / 448.

    The two exponents agree for torchao's FLOOR where amax is at most 1.75 times a power
    of two, and for its CEIL above: together, everywhere.
    """

    def test_scales_and_values_are_torchaos(self):
        x = groups_of_every_amax()
        mantissa, _ = torch.frexp(x.abs().amax(1))
        below = 2 * mantissa <= 1.75
        for mode, rows in (
            (ScaleCalculationMode.FLOOR, below),
            (ScaleCalculationMode.CEIL, ~below),
        ):
            values, scale = quantize(x[rows])
            expected_scale, expected = to_mx(x[rows], torch.float8_e4m3fn, 32, mode)
            self.assertGreater(len(scale), 6000)
            self.assertTrue(
                torch.equal(scale.view(-1), expected_scale.view(-1).view(torch.uint8))
            )
            self.assertTrue(
                torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
            )


if __name__ == "__main__":
    unittest.main()
