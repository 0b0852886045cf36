"""Each MXFP8 linear runs on a backend that takes its shape. No kernel runs; what they
refuse is read from FlashInfer 0.7.2."""

import unittest

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_linears import loaded_linear, on_gpu
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")
BF16, FP16 = torch.bfloat16, torch.float16


class TestMxfp8PerLayer(CustomTestCase):
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
            case = dict(flag=flag, n=n, k=k, dtype=dtype, dsl=has_cutedsl)
            with self.subTest(**case), on_gpu(100, flag, has_cutedsl):
                linear, _ = loaded_linear(n, k, dtype=dtype)
                backend = linear.quant_method.mxfp8_dense_backend.value
                self.assertEqual(backend, expected)

    def test_a_weight_only_layer_multiplies(self):
        with on_gpu():
            linear, weight = loaded_linear(96, 64)
        x = torch.randn(3, 64).to(BF16)
        self.assertTrue(torch.equal(linear(x)[0], x @ weight.to(BF16).T))
        with self.assertRaisesRegex(ValueError, "takes no quantized input"):
            linear((x.to(torch.float8_e4m3fn), torch.ones(3, 2, dtype=torch.uint8)))

    def test_no_tokens(self):
        with on_gpu():
            linear, _ = loaded_linear(256, 256)
            out = linear(torch.empty(0, 256, dtype=BF16))[0]
        self.assertEqual((out.shape, out.dtype), ((0, 256), BF16))


if __name__ == "__main__":
    unittest.main()
