"""The activation scales of an MXFP8 linear on trtllm are 8x4 or 128x4, by shape and M.
SM100 and FlashInfer are patched by name: what stands for its kernels reads each scale in
the layout that it is told, so that a wrong one gives a wrong product."""

import json
import unittest
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import flashinfer
import torch
from sglang.srt.environ import envs
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp8 import layout, numerics
from sglang.srt.runtime_context import override_platform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.layer_ut_utils import init_single_process_dist
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")
BF16 = torch.bfloat16


class TestMxfp8ScaleLayout(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_dist()

    def setUp(self):
        self.used = []
        flag = fp8_utils.Fp8GemmRunnerBackend("flashinfer_trtllm")
        patch, patches = mock.patch.object, ExitStack()
        self.addCleanup(patches.close)
        for each in (
            override_platform(is_sm100=True, is_blackwell=True),
            patch(fp8, "is_flashinfer_available", lambda: True),
            patch(fp8_utils, "is_flashinfer_available", lambda: True),
            patch(fp8_utils, "get_fp8_gemm_runner_backend", lambda: flag),
            patch(flashinfer, "block_scale_interleave", layout.swizzle_scale),
            *(
                patch(fp8_utils, name, function, create=True)
                for name, function in (
                    ("_raw_flashinfer_mm_mxfp8", self.multiply),
                    ("_raw_flashinfer_mxfp8_quantize", self.quantize),
                    ("flashinfer_mm_mxfp8", self.multiply),
                    ("flashinfer_mxfp8_quantize", self.quantize),
                )
            ),
        ):
            patches.enter_context(each)
        self.multiply.__func__.is_backend_supported = lambda name, sm: True
        if chosen := getattr(fp8_utils, "trtllm_mxfp8_linear_of", None):
            chosen.cache_clear()

    def quantize(self, input, sf_swizzle_layout=None, **_):
        values, scale = numerics.quantize(input)
        is_8x4 = sf_swizzle_layout == flashinfer.SfLayout.layout_8x4
        return values, layout.swizzle_scale(scale, 8 if is_8x4 else 128)

    def multiply(self, a, b, a_scale, b_scale, out_dtype, use_8x4_sf_layout, backend):
        (m, k), n, tile = a.shape, b.shape[1], 8 if use_8x4_sf_layout else 128
        self.used.append((backend, "8x4" if use_8x4_sf_layout else "128x4"))
        a_scale = layout.unswizzle_scale(a_scale, m, k // 32, tile)
        b_scale = layout.unswizzle_scale(b_scale, n, k // 32, shuffle=True)
        weight = numerics.dequantize(layout.unshuffle_rows(b.t()), b_scale)
        return (numerics.dequantize(a, a_scale) @ weight.T).to(out_dtype)

    def load(self, n, k):
        """The linear as it is after loading, and its weight in fp32."""
        config = Fp8Config(True, weight_block_size=[1, 32], use_mxfp8=True)
        linear = ReplicatedLinear(
            k, n, bias=False, params_dtype=BF16, quant_config=config
        )
        weight, scale = numerics.quantize(torch.randn(n, k).to(BF16))
        linear.weight.weight_loader(linear.weight, weight)
        linear.weight_scale_inv.weight_loader(linear.weight_scale_inv, scale)
        linear.quant_method.process_weights_after_loading(linear)
        return linear, numerics.dequantize(weight, scale)

    def layouts(self, n, k, *rows) -> str:
        """The layout of a call with each of these M; each product is the right one."""
        linear, weight = self.load(n, k)
        self.used.clear()
        for m in rows:
            x = torch.randn(m, k).to(BF16)
            wanted = numerics.dequantize(*numerics.quantize(x)) @ weight.T
            bias = torch.randn(n).to(BF16)
            got = linear.quant_method.apply(linear, x.view(1, m, k), bias)
            self.assertEqual((got.dtype, got.shape), (BF16, (1, m, n)))
            wanted = wanted.to(BF16) + bias
            torch.testing.assert_close(got[0], wanted, rtol=0.02, atol=0.1)
        self.assertEqual({backend for backend, _ in self.used}, {"trtllm"})
        return " ".join(used for _, used in self.used)

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
        fp8_utils.trtllm_mxfp8_linear_of.cache_clear()
        with envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.override("8x4"):
            self.assertEqual(self.layouts(2688, 256, 1, 129), "8x4 8x4")
            self.assertEqual(self.layouts(288, 256, 1), "128x4")
        fp8_utils.trtllm_mxfp8_linear_of.cache_clear()
        with envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.override("8x8"):
            with self.assertRaisesRegex(
                ValueError, "'8x8' is none of auto, 8x4, 128x4"
            ):
                self.load(256, 512)

    def test_a_table_of_this_gpu(self):
        table = {"device_name": "Some GPU", "flashinfer": "x"}
        table["layers"] = {"N=256,K=512": {"max_m_8x4": 3}}
        patch = mock.patch.object
        with TemporaryDirectory() as folder:
            Path(folder, "device_name=Some_GPU.json").write_text(json.dumps(table))
            with patch(fp8_utils, "get_device_name", lambda: "Some GPU"), patch(
                fp8_utils.scale_layout, "flashinfer_version", lambda: "x"
            ), envs.SGLANG_MXFP8_CONFIG_DIR.override(folder):
                self.assertEqual(self.layouts(256, 512, 3, 4), "8x4 128x4")

    def test_quantized_input_stays_128x4(self):
        linear, weight = self.load(256, 512)
        values, scale = numerics.quantize(torch.randn(5, 512).to(BF16))
        self.used.clear()
        got = linear((values, layout.swizzle_scale(scale)))[0]
        wanted = (numerics.dequantize(values, scale) @ weight.T).to(BF16)
        torch.testing.assert_close(got, wanted)
        self.assertEqual(self.used, [("trtllm", "128x4")])

    def test_no_tokens(self):
        linear, _ = self.load(256, 512)
        self.assertEqual(linear(torch.empty(0, 512, dtype=BF16))[0].shape, (0, 256))


if __name__ == "__main__":
    unittest.main()
