"""MXFP8 linears where no block-scaled product runs. GPUs are patched by name: the product
is plain torch here. Its kernels have test/registered/quant/test_mxfp8_weight_only.py.
"""

import unittest
from unittest import mock

import torch

from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_linears import loaded_linear, make_linear, on_gpu
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")
BF16, FP16 = torch.bfloat16, torch.float16
CONFIG = Fp8Config(True, use_mxfp8=True)
NAMED = ("flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_cutedsl", "deep_gemm")


class TestMxfp8AnyGpu(CustomTestCase):
    def test_auto_takes_what_runs(self):
        expected = {80: "weight_only", 89: "weight_only", 90: "weight_only"}
        expected |= {100: "flashinfer_cutedsl", 120: "flashinfer_cutlass"}
        for sm, backend in expected.items():
            with self.subTest(sm=sm), on_gpu(sm):
                found = fp8_utils.resolve_mxfp8_dense_gemm_backend()
                self.assertEqual(found.value, backend)

    def test_a_backend_that_cannot_run_names_auto(self):
        runs = {90: (), 120: ("flashinfer_cutlass", "deep_gemm"), 100: NAMED}
        for sm, flag in ((sm, flag) for sm in runs for flag in NAMED):
            with self.subTest(sm=sm, flag=flag), on_gpu(sm, flag):
                if flag in runs[sm]:
                    found = fp8_utils.resolve_mxfp8_dense_gemm_backend()
                    self.assertEqual(found.value, flag)
                else:
                    with self.assertRaisesRegex(RuntimeError, f"{flag}.* auto takes"):
                        fp8_utils.resolve_mxfp8_dense_gemm_backend()

    def test_capability(self):
        with on_gpu(90):
            self.assertEqual(CONFIG.get_min_capability(), 80)
        for name, value, capability in (
            ("is_npu", lambda: True, 0),
            ("_is_musa", True, 31),
            ("_mxfp8_to_block_fp8_required", True, 94),
        ):
            with mock.patch.object(fp8, name, value):
                self.assertEqual(CONFIG.get_min_capability(), capability)

    def test_experts_are_refused(self):
        with on_gpu(90), self.assertRaisesRegex(ValueError, "MXFP8 experts need"):
            Fp8MoEMethod(CONFIG)
        with on_gpu(100):
            Fp8MoEMethod(CONFIG)

    def test_marlin_is_not_taken(self):
        with on_gpu(80):
            self.assertFalse(Fp8LinearMethod(CONFIG).use_marlin)

    def assert_close(self, found, expected, limit: float):
        self.assertEqual(found.dtype, expected.dtype)
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        self.assertLess(error, limit)

    def test_product(self):
        for n, k, dtype in ((256, 256, BF16), (256, 256, FP16), (50, 96, BF16)):
            with self.subTest(n=n, k=k, dtype=dtype), on_gpu(90):
                linear, weight = loaded_linear(n, k, dtype=dtype, bias=True)
                linear.bias.data = torch.randn(n).to(dtype)
                x = torch.randn(2, 3, k).to(dtype)
                expected = x @ weight.to(dtype).T + linear.bias
                self.assert_close(linear(x)[0], expected, 0.004)
                self.assertEqual(linear(x[:0])[0].shape, (0, 3, n))

    def test_a_weight_is_quantized_as_it_loads(self):
        with on_gpu(80):
            linear = make_linear(64, 96, serialized=False)
            weight = torch.randn(64, 96).to(BF16)
            linear.weight.weight_loader(linear.weight, weight)
            linear.quant_method.process_weights_after_loading(linear)
            self.assertEqual(linear.weight.dtype, torch.float8_e4m3fn)
            x = torch.randn(5, 96).to(BF16)
            self.assert_close(linear(x)[0], x @ weight.T, 0.04)

    def test_the_op_has_a_shape_for_compilers(self):
        x = torch.empty(5, 96, dtype=BF16, device="meta")
        weight = torch.empty(64, 96, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(64, 3, dtype=torch.uint8, device="meta")
        out = torch.ops.sglang.weight_only_mxfp8_op(x, weight, scale)
        self.assertEqual((out.shape, out.dtype), ((5, 64), BF16))


if __name__ == "__main__":
    unittest.main()
