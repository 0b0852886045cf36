"""What a call of an MXFP8 linear costs the host, as far as no clock is needed."""

import contextlib
import unittest
from functools import lru_cache
from itertools import product
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.quantization.mxfp8.layout import swizzled_scale_numel
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    init_single_process_parallel_state,
    mxfp8_config,
    random_mxfp8,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="default")

BACKENDS = ("trtllm", "cutlass")
N, K = 576, 768  # their scale is padded
VIEWS = {2: 2, 3: 4}  # torch ops of one call, by the input's dimensions


class StubKernels:
    """FlashInfer's quantizer and GEMM: they return tensors made before, and keep what
    they get."""

    def __init__(self, m: int):
        self.quantized = torch.empty(m, K, dtype=torch.float8_e4m3fn)
        self.scale = torch.empty(0, dtype=torch.uint8)
        self.output = torch.empty(m, N, dtype=torch.bfloat16)

    def mxfp8_quantize(self, input, **kwargs):
        self.input = input
        return self.quantized, self.scale

    def mm_mxfp8(self, a, b, a_descale, b_descale, **kwargs):
        self.a, self.b, self.a_descale, self.b_descale = a, b, a_descale, b_descale
        return self.output


@contextlib.contextmanager
def stubbed_kernels(m: int):
    """Stubs in FlashInfer's place, below everything of ours that wraps it."""
    stubs = StubKernels(m)
    kernels = lru_cache(maxsize=None)(fp8_utils._kernels.__wrapped__)
    with (
        mock.patch("flashinfer.mxfp8_quantize", stubs.mxfp8_quantize),
        mock.patch("flashinfer.mm_mxfp8", stubs.mm_mxfp8),
        mock.patch.object(fp8_utils, "mxfp8_kernels_missing", lambda backend: ""),
        mock.patch.object(fp8_utils, "_kernels", kernels),
    ):
        yield stubs


class TorchOps(TorchDispatchMode):
    """Lists the torch ops that run."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def build(backend: str) -> ReplicatedLinear:
    """A loaded layer."""
    with fp8_gemm_backend(f"flashinfer_{backend}"):
        layer = ReplicatedLinear(
            K,
            N,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=mxfp8_config(),
            prefix="m.proj",
        )
    _, weight, scale = random_mxfp8(N, K)
    layer.weight.weight_loader(layer.weight, weight)
    layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


class TestMXFP8HostOverhead(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.layers = {backend: build(backend) for backend in BACKENDS}

    def for_each_case(self, check):
        """Calls check(layer, x, stubs) for each backend and shape of the input."""
        shapes = (1, K), (64, K), (1, 1, K), (2, 32, K)
        for (backend, layer), shape in product(self.layers.items(), shapes):
            x = torch.randn(shape).bfloat16()
            with (
                self.subTest(backend=backend, shape=shape),
                stubbed_kernels(x.numel() // K) as stubs,
                torch.inference_mode(),
            ):
                check(layer, x, stubs)

    def test_kernels_get_the_tensors_themselves(self):
        def check(layer, x, stubs):
            weight, scale = layer.weight, layer.weight_scale_inv
            output = layer.quant_method.apply(layer, x, None)
            self.assertEqual(stubs.input.data_ptr(), x.data_ptr())
            self.assertEqual(stubs.input.shape, stubs.quantized.shape)
            self.assertIs(stubs.a, stubs.quantized)
            self.assertIs(stubs.a_descale, stubs.scale)
            self.assertEqual(stubs.b.data_ptr(), weight.data_ptr())
            self.assertEqual((stubs.b.shape, stubs.b.stride()), ((K, N), (1, K)))
            self.assertEqual(stubs.b_descale.data_ptr(), scale.data_ptr())
            padded = swizzled_scale_numel(*scale.shape)
            self.assertEqual(stubs.b_descale.shape, (padded,))
            self.assertEqual(output.data_ptr(), stubs.output.data_ptr())
            self.assertEqual(output.shape, (*x.shape[:-1], N))

        self.for_each_case(check)

    def test_only_views(self):
        """No copy and no allocation: a few views are all that runs beside the kernels."""

        def check(layer, x, stubs):
            with TorchOps() as counted:
                layer.quant_method.apply(layer, x, None)
            self.assertTrue(all(op.is_view for op in counted.ops), counted.ops)
            self.assertLessEqual(len(counted.ops), VIEWS[x.dim()], counted.ops)

        self.for_each_case(check)

    def test_no_flag_look_up(self):
        def check(layer, x, stubs):
            layer.quant_method.apply(layer, x, None)

        look_up = mock.Mock(side_effect=AssertionError("a flag is looked up"))
        name = "get_fp8_gemm_runner_backend"
        with mock.patch.object(fp8, name, look_up):
            with mock.patch.object(fp8_utils, name, look_up):
                self.for_each_case(check)


if __name__ == "__main__":
    unittest.main()
