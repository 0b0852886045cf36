"""The activation scales of an MXFP8 linear on trtllm are 8x4 or 128x4, by shape and M.
No kernel runs."""

import json
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import numerics
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_linears import interleave, loaded_linear, on_gpu
from sglang.test.mxfp8_products import mm_mxfp8, mxfp8_quantize, through_mxfp8
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")
BF16 = torch.bfloat16


class TestMxfp8ScaleLayout(CustomTestCase):
    def load(self, n, k):
        """A linear on trtllm, and its weight in fp32; `self.used` has the calls' layouts."""
        self.used = []

        def multiply(*args, use_8x4_sf_layout, backend, **options):
            self.used.append("8x4" if use_8x4_sf_layout else "128x4")
            options.update(use_8x4_sf_layout=use_8x4_sf_layout, backend=backend)
            self.assertEqual(backend, "trtllm")
            return mm_mxfp8(*args, **options)

        functions = {"mm_mxfp8": multiply, "mxfp8_quantize": mxfp8_quantize}
        self.enterContext(on_gpu(100, "flashinfer_trtllm", **functions))
        return loaded_linear(n, k)

    def layouts(self, n, k, *rows) -> str:
        """The layout of a call with each of these M; each product is the right one."""
        linear, weight = self.load(n, k)
        for m in rows:
            x, bias = torch.randn(m, k).to(BF16), torch.randn(n).to(BF16)
            got = linear.quant_method.apply(linear, x.view(1, m, k), bias)
            self.assertEqual((got.dtype, got.shape), (BF16, (1, m, n)))
            wanted = (through_mxfp8(x) @ weight.T).to(BF16) + bias
            torch.testing.assert_close(got[0], wanted, rtol=0.02, atol=0.1)
        return " ".join(self.used)

    def test_the_rule(self):
        for n, k, expected in (
            (256, 512, "8x4 8x4 128x4"),
            (2560, 256, "8x4 8x4 128x4"),
            (2688, 256, "128x4 128x4 128x4"),  # wide
            (288, 256, "128x4 128x4 128x4"),  # FlashInfer refuses 8x4
        ):
            with self.subTest(n=n, k=k):
                self.assertEqual(self.layouts(n, k, 1, 128, 129), expected)

    def test_a_variable_forces_it(self):
        with envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.override("128x4"):
            self.assertEqual(self.layouts(256, 512, 1, 129), "128x4 128x4")
        with envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.override("8x4"):
            self.assertEqual(self.layouts(2688, 256, 1, 129), "8x4 8x4")
            self.assertEqual(self.layouts(288, 256, 1), "128x4")
        with envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.override("8x8"):
            with self.assertRaisesRegex(ValueError, "'8x8' is none of auto, 8x4"):
                self.load(256, 512)

    def test_a_table_of_this_gpu(self):
        table = {"device_name": "Some GPU", "flashinfer": "x"}
        table["layers"] = {"N=256,K=512": {"max_m_8x4": 3}}
        patch = mock.patch.object
        with TemporaryDirectory() as folder:
            Path(folder, "device_name=Some_GPU.json").write_text(json.dumps(table))
            with (
                patch(fp8_utils, "get_device_name", lambda: "Some GPU"),
                patch(fp8_utils.scale_layout, "flashinfer_version", lambda: "x"),
                envs.SGLANG_MXFP8_CONFIG_DIR.override(folder),
            ):
                self.assertEqual(self.layouts(256, 512, 3, 4), "8x4 128x4")

    def test_quantized_input_stays_128x4(self):
        linear, weight = self.load(256, 512)
        values, scale = numerics.quantize(torch.randn(5, 512).to(BF16))
        got = linear((values, interleave(scale)))[0]
        wanted = (numerics.dequantize(values, scale) @ weight.T).to(BF16)
        torch.testing.assert_close(got, wanted)
        self.assertEqual(self.used, ["128x4"])

    def test_no_tokens(self):
        linear, _ = self.load(256, 512)
        self.assertEqual(linear(torch.empty(0, 512, dtype=BF16))[0].shape, (0, 256))


if __name__ == "__main__":
    unittest.main()
