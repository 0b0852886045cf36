"""The emulated kernels: rounding against a float64 model, refusals against FlashInfer's."""

import unittest

import torch

from sglang.srt.layers.quantization.mxfp8 import emulation, numerics
from sglang.srt.layers.quantization.mxfp8.layout import shuffle_rows, swizzle_scale
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import random_mxfp8, reference_linear
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="default")

NAN, INF = float("nan"), float("inf")


def one_group(*values: float, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.tensor([list(values) + [0.0] * (32 - len(values))], dtype=dtype)


class TestMXFP8Quantizer(CustomTestCase):
    def test_scale_is_amax_over_448_rounded_up(self):
        x = torch.randn(512, 256).bfloat16() * torch.exp2(
            torch.randint(-100, 100, (512, 1))
        )
        values, scale = numerics.quantize(x)
        amax = x.double().view(512, 8, 32).abs().amax(-1)
        expected = torch.ceil(torch.log2(amax / 448)).clamp(min=-127)
        self.assertTrue(torch.equal(scale.double() - 127, expected))

    def test_values_are_the_nearest_e4m3(self):
        x = torch.randn(64, 64).bfloat16()
        values, scale = numerics.quantize(x)
        grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        grid = grid[~grid.isnan()]
        factor = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
        scaled = x.double() / factor
        best = (scaled.unsqueeze(-1) - grid).abs().amin(-1)
        self.assertTrue(torch.equal((scaled - values.double()).abs(), best))

    def test_edges(self):
        cases = {
            "zeros": (one_group(0.0), 0, 0.0),
            "448 needs no scaling": (one_group(448.0), 127, 448.0),
            "just above 448 rounds the scale up": (one_group(450.0), 128, 224.0),
            "a power of two of 448": (one_group(448.0 * 2**40), 167, 448.0),
            "amax / 448 is subnormal": (one_group(446 * 2.0**-126), 0, 0.0),
            "the smallest scale": (one_group(448 * 2.0**-126), 1, 448.0),
        }
        for name, (x, byte, first) in cases.items():
            with self.subTest(name):
                values, scale = numerics.quantize(x)
                self.assertEqual(scale.item(), byte)
                self.assertEqual(values[0, 0].float().item(), first)

    def test_nan_and_inf_follow_the_device_code(self):
        values, scale = numerics.quantize(one_group(NAN, 448.0))
        self.assertEqual(scale.item(), 127)
        self.assertTrue(values[0, 0].float().isnan())
        self.assertEqual(values[0, 1].float().item(), 448.0)

        values, scale = numerics.quantize(one_group(INF, 3.0, -3.0))
        self.assertEqual(scale.item(), 254)
        self.assertTrue(values[0, 0].float().isnan())
        self.assertEqual(values[0, 1:3].view(torch.uint8).tolist(), [0x00, 0x80])

        values, scale = numerics.quantize(torch.full((1, 32), NAN).bfloat16())
        self.assertEqual(scale.item(), 255)
        self.assertTrue(values.float().isnan().all())

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
    def problem(self, m=5, n=160, k=512, backend="cutlass", use_8x4=False):
        _, weight, scale = random_mxfp8(n, k)
        x = torch.randn(m, k).bfloat16()
        a, a_descale = emulation.mxfp8_quantize(x, use_8x4)
        expected = reference_linear(x, weight, scale)
        if backend == "trtllm":
            weight = shuffle_rows(weight.view(torch.uint8)).view(weight.dtype)
            scale = shuffle_rows(scale)
        arguments = dict(
            a=a,
            b=weight.t(),
            a_descale=a_descale,
            b_descale=swizzle_scale(scale),
            use_8x4_sf_layout=use_8x4,
            backend=backend,
        )
        return arguments, expected

    def test_decodes_the_bytes_of_each_layout(self):
        for backend, use_8x4, n in (
            ("cutlass", False, 160),
            ("trtllm", False, 160),
            ("trtllm", True, 256),
        ):
            with self.subTest(backend=backend, use_8x4=use_8x4):
                arguments, expected = self.problem(
                    n=n, backend=backend, use_8x4=use_8x4
                )
                output = emulation.mm_mxfp8(**arguments)
                torch.testing.assert_close(output, expected.bfloat16())

    def test_reads_neither_plain_rows_as_shuffled_nor_the_reverse(self):
        arguments, expected = self.problem(backend="trtllm")
        output = emulation.mm_mxfp8(**{**arguments, "backend": "cutlass"})
        self.assertFalse(torch.allclose(output.double(), expected, rtol=0.1))

    def test_refuses_what_flashinfer_refuses(self):
        from flashinfer.gemm.gemm_base import _check_mm_mxfp8_problem_size as check

        def refuses(function, arguments):
            try:
                function(**arguments)
            except ValueError:
                return True
            return False

        good, _ = self.problem()
        changes = {
            "nothing": {},
            "N below 128": self.problem(n=96)[0],
            "K below 128": self.problem(k=96)[0],
            "a is not e4m3": {"a": good["a"].to(torch.bfloat16)},
            "b is not e4m3": {"b": good["b"].to(torch.bfloat16)},
            "a_descale is not bytes": {"a_descale": good["a_descale"].float()},
            "b_descale is not bytes": {"b_descale": good["b_descale"].float()},
            "a_descale too short": {"a_descale": good["a_descale"][:-4]},
            "b_descale too long": {"b_descale": good["b_descale"].repeat(2)},
            "8x4 flag on 128x4 bytes": {"use_8x4_sf_layout": True},
            "fp32 output": {"out_dtype": torch.float32},
            "K differs": {"a": good["a"][:, :256].contiguous()},
            "8x4 with N not a multiple of 128": self.problem(
                n=160, use_8x4=True, backend="trtllm"
            )[0],
        }
        for name, change in changes.items():
            with self.subTest(name):
                arguments = {**good, "out_dtype": torch.bfloat16, **change}
                self.assertEqual(
                    refuses(emulation.mm_mxfp8, arguments), refuses(check, arguments)
                )
                self.assertEqual(refuses(check, arguments), name != "nothing")

    def test_refuses_what_the_kernels_cannot_run(self):
        trtllm, _ = self.problem(backend="trtllm")
        with self.assertRaisesRegex(ValueError, "K % 256 == 0, got k=384"):
            emulation.mm_mxfp8(**self.problem(k=384, backend="trtllm")[0])
        with self.assertRaisesRegex(ValueError, "trtllm writes bf16 only"):
            emulation.mm_mxfp8(**trtllm, out_dtype=torch.float16)
        with self.assertRaisesRegex(ValueError, "N % 32 == 0"):
            emulation.mm_mxfp8(**self.problem(n=136)[0])
        with self.assertRaisesRegex(ValueError, "128x4 scale layout only"):
            emulation.mm_mxfp8(**self.problem(n=128, use_8x4=True)[0])
        with self.assertRaisesRegex(ValueError, "column-major"):
            emulation.mm_mxfp8(**{**trtllm, "b": trtllm["b"].contiguous()})


if __name__ == "__main__":
    unittest.main()
