"""A linear on a CPU multiplies as FlashInfer's kernels would, on upstream's own code."""

import unittest

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    init_single_process_parallel_state,
    random_mxfp8,
    reference_linear,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")


class TestMxfp8LocalCpu(CustomTestCase):
    def test_each_backend_multiplies_if_asked_to(self):
        init_single_process_parallel_state()
        with self.assertRaisesRegex(RuntimeError, "SM100"):
            self.load("flashinfer_trtllm", 256, 256, emulation=False)
        for flag, n, k, expected in (
            ("flashinfer_trtllm", 256, 512, "flashinfer_trtllm"),
            ("flashinfer_trtllm", 160, 256, "flashinfer_trtllm"),  # padded rows
            ("flashinfer_trtllm", 160, 544, "flashinfer_cutlass"),  # and columns
            ("flashinfer_cutlass", 128, 192, "flashinfer_cutlass"),
            ("auto", 256, 512, "flashinfer_cutlass"),
        ):
            with self.subTest(flag=flag, n=n, k=k):
                linear, weight, scale = self.load(flag, n, k)
                x = torch.randn(5, k).bfloat16()
                wanted = reference_linear(x, weight, scale).bfloat16()
                backend = linear.quant_method.mxfp8_dense_backend.value
                self.assertEqual(backend, expected)
                torch.testing.assert_close(linear(x)[0], wanted, rtol=0.01, atol=0.01)

    def load(self, flag, n, k, emulation=True):
        """The linear as it is after loading, and what was loaded."""
        _, weight, scale = random_mxfp8(n, k)
        config = Fp8Config(True, weight_block_size=[1, 32], use_mxfp8=True)
        with fp8_gemm_backend(flag, emulation):
            linear = ReplicatedLinear(
                k, n, bias=False, params_dtype=torch.bfloat16, quant_config=config
            )
        linear.weight.weight_loader(linear.weight, weight)
        linear.weight_scale_inv.weight_loader(linear.weight_scale_inv, scale)
        linear.quant_method.process_weights_after_loading(linear)
        return linear, weight, scale


if __name__ == "__main__":
    unittest.main()
