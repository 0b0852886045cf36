"""Each MXFP8 linear runs on a backend that takes its shape. SM100 and FlashInfer are patched
by name, so that no kernel runs; what they refuse is read from FlashInfer 0.7.2."""

import unittest
from contextlib import ExitStack
from unittest import mock

import flashinfer
import torch

from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.runtime_context import override_platform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.layer_ut_utils import init_single_process_dist
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")
BF16, FP16 = torch.bfloat16, torch.float16


class TestMxfp8PerLayer(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_dist()

    def setUp(self):
        kernel = mock.Mock()
        kernel.is_backend_supported.side_effect = lambda name, sm: self.has_cutedsl
        patch, self.has_cutedsl = mock.patch.object, True
        patches = ExitStack()
        self.addCleanup(patches.close)
        for each in (
            override_platform(is_sm100=True, is_blackwell=True),
            patch(fp8, "is_flashinfer_available", lambda: True),
            patch(fp8_utils, "is_flashinfer_available", lambda: True),
            patch(fp8_utils, "_raw_flashinfer_mm_mxfp8", kernel, create=True),
            patch(fp8_utils.deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True),
            patch(flashinfer, "block_scale_interleave", torch.flatten),
            patch(flashinfer, "shuffle_matrix_sf_a", lambda scale, *_, **__: scale),
        ):
            patches.enter_context(each)

    def load(self, flag, n, k, dtype=BF16):
        """The linear as it is after loading, its weight in bf16 and its backend."""
        if select := getattr(fp8_utils, "select_mxfp8_dense_gemm_backend", None):
            select.cache_clear()
        flag = fp8_utils.Fp8GemmRunnerBackend(flag)
        config = Fp8Config(True, weight_block_size=[1, 32], use_mxfp8=True)
        with mock.patch.object(fp8_utils, "get_fp8_gemm_runner_backend", lambda: flag):
            linear = ReplicatedLinear(
                k, n, bias=False, params_dtype=dtype, quant_config=config
            )
        weight = torch.randn(n, k).to(torch.float8_e4m3fn)
        linear.weight.weight_loader(linear.weight, weight)
        scale = torch.randint(120, 128, (n, k // 32), dtype=torch.uint8)
        linear.weight_scale_inv.weight_loader(linear.weight_scale_inv, scale)
        linear.quant_method.process_weights_after_loading(linear)
        factor = torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
        backend = linear.quant_method.mxfp8_dense_backend.value
        return linear, (weight.float() * factor).to(dtype), backend

    def test_the_backend_takes_the_shape(self):
        for flag, n, k, dtype, has_cutedsl, expected in (
            ("auto", 256, 256, BF16, True, "flashinfer_cutedsl"),
            ("flashinfer_trtllm", 256, 256, BF16, True, "flashinfer_trtllm"),
            ("flashinfer_trtllm", 96, 4096, BF16, True, "weight_only"),
            ("flashinfer_trtllm", 1000, 256, BF16, True, "flashinfer_cutedsl"),
            ("flashinfer_trtllm", 1000, 256, BF16, False, "weight_only"),
            ("flashinfer_trtllm", 256, 576, BF16, True, "flashinfer_cutedsl"),
            ("flashinfer_trtllm", 256, 576, BF16, False, "flashinfer_cutlass"),
            ("flashinfer_trtllm", 256, 256, FP16, True, "flashinfer_cutedsl"),
            ("flashinfer_cutlass", 256, 64, BF16, True, "weight_only"),
            ("flashinfer_cutedsl", 1001, 256, BF16, True, "weight_only"),
            ("deep_gemm", 1000, 256, BF16, True, "flashinfer_cutedsl"),
            ("deep_gemm", 256, 256, FP16, True, "flashinfer_cutedsl"),
        ):
            with self.subTest(flag=flag, n=n, k=k, dtype=dtype, dsl=has_cutedsl):
                self.has_cutedsl = has_cutedsl
                self.assertEqual(self.load(flag, n, k, dtype)[2], expected)

    def test_a_weight_only_layer_multiplies(self):
        linear, weight, _ = self.load("auto", 96, 64)
        x = torch.randn(3, 64).to(BF16)
        self.assertTrue(torch.equal(linear(x)[0], x @ weight.T))
        with self.assertRaisesRegex(ValueError, "takes no quantized input"):
            linear((x.to(torch.float8_e4m3fn), torch.ones(3, 2, dtype=torch.uint8)))

    def test_no_tokens(self):
        linear, _, _ = self.load("auto", 256, 256)
        out = linear(torch.empty(0, 256, dtype=BF16))[0]
        self.assertEqual((out.shape, out.dtype), ((0, 256), BF16))


if __name__ == "__main__":
    unittest.main()
