"""The quantizer against torchao, the emulated kernels against FlashInfer's own refusals.

FlashInfer's host quantizer and shuffles need nvcc and a GPU: they were compared once, on
an H200.
"""

import unittest
from contextlib import nullcontext

import torch
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

from sglang.srt.layers.quantization.mxfp8 import emulation, numerics
from sglang.srt.layers.quantization.mxfp8.layout import swizzle_scale
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import random_mxfp8, same_bytes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="default")

NAN, INF = float("nan"), float("inf")


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


class TestMXFP8Quantizer(CustomTestCase):
    def test_scales_and_values_are_torchaos(self):
        """torchao rounds a scale from amax / 256, FlashInfer up from amax / 448.

        The two exponents agree for torchao's FLOOR where amax is at most 1.75 times a
        power of two, and for its CEIL above: together, everywhere.
        """
        x = groups_of_every_amax()
        mantissa, _ = torch.frexp(x.abs().amax(1))
        below = 2 * mantissa <= 1.75
        for mode, rows in (
            (ScaleCalculationMode.FLOOR, below),
            (ScaleCalculationMode.CEIL, ~below),
        ):
            values, scale = numerics.quantize(x[rows])
            expected_scale, expected = to_mx(x[rows], torch.float8_e4m3fn, 32, mode)
            self.assertGreater(len(scale), 6000)
            self.assertTrue(same_bytes(scale, expected_scale))
            self.assertTrue(same_bytes(values, expected))

    def test_edges(self):
        """Of one group, whose other values are zeros; with NaN, as the device code."""
        for name, values, byte, expected in (
            ("zeros", [0.0], 0, [0.0]),
            ("448 needs no scaling", [448.0], 127, [448.0]),
            ("just above 448 rounds the scale up", [450.0], 128, [224.0]),
            ("a power of two of 448", [448.0 * 2**40], 167, [448.0]),
            ("amax / 448 is subnormal", [446 * 2.0**-126], 0, [0.0]),
            ("the smallest scale", [448 * 2.0**-126], 1, [448.0]),
            ("NaN", [NAN, 448.0], 127, [NAN, 448.0]),
            ("infinity", [INF, 3.0, -3.0], 254, [NAN, 0.0, -0.0]),
            ("NaN alone", [NAN] * 32, 255, [NAN] * 32),
        ):
            with self.subTest(name):
                x = torch.zeros(1, 32, dtype=torch.bfloat16)
                x[0, : len(values)] = torch.tensor(values)
                found, scale = numerics.quantize(x)
                self.assertEqual(scale.item(), byte)
                # As text, NaN equals itself, and zeros have a sign.
                found = found[0, : len(values)].float().tolist()
                self.assertEqual(str(found), str(expected))

    def test_dequantize_every_scale_byte(self):
        ones = torch.ones(1, 32 * 256).to(torch.float8_e4m3fn)
        scale = torch.arange(256, dtype=torch.uint8).view(1, -1)
        decoded = numerics.dequantize(ones, scale)[0, ::32].double()
        self.assertEqual(decoded[:255].tolist(), [2.0 ** (b - 127) for b in range(255)])
        self.assertTrue(decoded[255].isnan())

    def test_k_must_be_whole_groups(self):
        with self.assertRaisesRegex(ValueError, "K % 32 == 0, got K = 48"):
            numerics.quantize(torch.zeros(2, 48))


class TestMXFP8Matmul(CustomTestCase):
    """That it computes what it should: test_mxfp8_linear.py."""

    def problem(self, n=160, k=512, use_8x4=False, backend="cutlass") -> dict:
        """Arguments of mm_mxfp8."""
        _, b, scale = random_mxfp8(n, k)
        a, a_descale = emulation.mxfp8_quantize(torch.randn(5, k).bfloat16(), use_8x4)
        return dict(
            a=a,
            b=b.t(),
            a_descale=a_descale,
            b_descale=swizzle_scale(scale),
            use_8x4_sf_layout=use_8x4,
            backend=backend,
        )

    def test_refuses_what_flashinfer_refuses(self):
        from flashinfer.gemm.gemm_base import _check_mm_mxfp8_problem_size as check

        good = self.problem()
        changes = {
            "nothing": {},
            "N below 128": self.problem(n=96),
            "K below 128": self.problem(k=96),
            "a is not e4m3": {"a": good["a"].to(torch.bfloat16)},
            "b is not e4m3": {"b": good["b"].to(torch.bfloat16)},
            "a_descale is not bytes": {"a_descale": good["a_descale"].float()},
            "b_descale is not bytes": {"b_descale": good["b_descale"].float()},
            "a_descale too short": {"a_descale": good["a_descale"][:-4]},
            "b_descale too long": {"b_descale": good["b_descale"].repeat(2)},
            "8x4 flag on 128x4 bytes": {"use_8x4_sf_layout": True},
            "fp32 output": {"out_dtype": torch.float32},
            "K differs": {"a": good["a"][:, :256].contiguous()},
            "8x4 and N % 128 != 0": self.problem(use_8x4=True, backend="trtllm"),
        }
        for name, change in changes.items():
            arguments = {**good, "out_dtype": torch.bfloat16, **change}
            for function in emulation.mm_mxfp8, check:
                refused = self.assertRaises(ValueError) if change else nullcontext()
                with self.subTest(name, function=function), refused:
                    function(**arguments)

    def test_refuses_what_the_kernels_cannot_run(self):
        fp16 = {"out_dtype": torch.float16}
        for message, problem, change in (
            ("K % 256 == 0, got k=384", dict(k=384, backend="trtllm"), {}),
            ("trtllm writes bf16 only", dict(backend="trtllm"), fp16),
            ("N % 32 == 0", dict(n=136), {}),
            ("128x4 scale layout only", dict(n=128, use_8x4=True), {}),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                emulation.mm_mxfp8(**{**self.problem(**problem), **change})
        good = self.problem()
        with self.assertRaisesRegex(ValueError, "column-major"):
            emulation.mm_mxfp8(**{**good, "b": good["b"].contiguous()})


if __name__ == "__main__":
    unittest.main()
