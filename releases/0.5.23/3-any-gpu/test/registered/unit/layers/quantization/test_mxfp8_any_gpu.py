"""MXFP8 linears where no block-scaled product runs. GPUs are patched by name: the product
is plain torch here. Its kernels have test/registered/quant/test_mxfp8_weight_only.py.
"""

import unittest
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from sglang.srt.runtime_context import override_platform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.layer_ut_utils import init_single_process_dist
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="base-a-test-cpu")
BF16, FP16 = torch.bfloat16, torch.float16
NAMED = ("flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_cutedsl", "deep_gemm")


def config(serialized: bool = True) -> Fp8Config:
    return Fp8Config(is_checkpoint_fp8_serialized=serialized, use_mxfp8=True)


@contextmanager
def gpu(sm: int, flag: str = "auto"):
    """FlashInfer and DeepGEMM are installed, on a GPU of this compute capability."""
    kernel = mock.Mock(is_backend_supported=lambda name, sm: sm // 10 == 10)
    major, is_new = sm // 10, sm >= 100
    flag = fp8_utils.Fp8GemmRunnerBackend(flag)
    facts = {"is_sm90": major == 9, "is_sm100": major == 10, "is_blackwell": is_new}
    with ExitStack() as patches:
        patches.enter_context(override_platform(**facts))
        for module, name, value in (
            (fp8, "_is_cuda", True),
            (fp8, "get_device_capability", lambda: divmod(sm, 10)),
            (fp8, "can_auto_enable_marlin_fp8", lambda: 80 <= sm < 89),
            (fp8_utils, "_is_cuda", True),
            (fp8_utils, "get_device_capability", lambda: divmod(sm, 10)),
            (fp8_utils, "get_device_sm", lambda: sm),
            (fp8_utils, "is_flashinfer_available", lambda: True),
            (fp8_utils, "get_fp8_gemm_runner_backend", lambda: flag),
            (fp8_utils, "_raw_flashinfer_mm_mxfp8", kernel),
            (fp8_utils.deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", sm >= 90),
        ):
            patch = mock.patch.object(module, name, value, create=name[0] == "_")
            patches.enter_context(patch)
        yield


class TestMxfp8AnyGpu(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_dist()

    def test_auto_takes_what_runs(self):
        expected = {80: "weight_only", 89: "weight_only", 90: "weight_only"}
        expected |= {100: "flashinfer_cutedsl", 120: "flashinfer_cutlass"}
        for sm, backend in expected.items():
            with self.subTest(sm=sm), gpu(sm):
                found = fp8_utils.resolve_mxfp8_dense_gemm_backend()
                self.assertEqual(found.value, backend)

    def test_a_backend_that_cannot_run_names_auto(self):
        runs = {90: (), 120: ("flashinfer_cutlass", "deep_gemm"), 100: NAMED}
        for sm, flag in ((sm, flag) for sm in runs for flag in NAMED):
            with self.subTest(sm=sm, flag=flag), gpu(sm, flag):
                if flag in runs[sm]:
                    found = fp8_utils.resolve_mxfp8_dense_gemm_backend()
                    self.assertEqual(found.value, flag)
                else:
                    with self.assertRaisesRegex(RuntimeError, f"{flag}.* auto takes"):
                        fp8_utils.resolve_mxfp8_dense_gemm_backend()

    def test_capability(self):
        with gpu(90):
            self.assertEqual(config().get_min_capability(), 80)
        for name, value, capability in (
            ("is_npu", lambda: True, 0),
            ("_is_musa", True, 31),
            ("_mxfp8_to_block_fp8_required", True, 94),
        ):
            with mock.patch.object(fp8, name, value):
                self.assertEqual(config().get_min_capability(), capability)

    def test_experts_are_refused(self):
        with gpu(90), self.assertRaisesRegex(ValueError, "MXFP8 experts need"):
            Fp8MoEMethod(config())
        with gpu(100):
            Fp8MoEMethod(config())

    def test_marlin_is_not_taken(self):
        with gpu(80):
            self.assertFalse(Fp8LinearMethod(config()).use_marlin)

    def linear(self, n: int, k: int, dtype: torch.dtype, serialized: bool = True):
        return ReplicatedLinear(
            k, n, bias=True, params_dtype=dtype, quant_config=config(serialized)
        )

    def assert_close(self, found, expected, limit: float):
        self.assertEqual(found.dtype, expected.dtype)
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        self.assertLess(error, limit)

    def test_product(self):
        for n, k, dtype in ((256, 256, BF16), (256, 256, FP16), (50, 96, BF16)):
            with self.subTest(n=n, k=k, dtype=dtype), gpu(90):
                linear = self.linear(n, k, dtype)
                weight = torch.randn(n, k).to(torch.float8_e4m3fn)
                scale = torch.randint(120, 128, (n, k // 32), dtype=torch.uint8)
                bias = torch.randn(n).to(dtype)
                linear.weight.weight_loader(linear.weight, weight)
                linear.weight_scale_inv.weight_loader(linear.weight_scale_inv, scale)
                linear.bias.data = bias
                linear.quant_method.process_weights_after_loading(linear)
                factor = torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
                weight = (weight.float() * factor).to(dtype)
                x = torch.randn(2, 3, k).to(dtype)
                self.assert_close(linear(x)[0], x @ weight.T + bias, 0.004)
                self.assertEqual(linear(x[:0])[0].shape, (0, 3, n))

    def test_a_weight_is_quantized_as_it_loads(self):
        with gpu(80):
            linear = self.linear(64, 96, BF16, serialized=False)
            weight = torch.randn(64, 96).to(BF16)
            linear.weight.weight_loader(linear.weight, weight)
            linear.bias.data.zero_()
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
