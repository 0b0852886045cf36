"""A server finds wrong MXFP8 kernels before anything reads its model. SM100, FlashInfer and
DeepGEMM are patched by name; faults are planted in the plain torch that stands for them.
"""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
import unittest
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import flashinfer
import sglang.kernels.ops.gemm.fp8_kernel as gemm_kernels
import sglang.kernels.ops.quantization.fp8_kernel as quantizers
import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.device_communicators import pynccl
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8, fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp8 import layout, numerics
from sglang.srt.model_executor import model_runner
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.runtime_context import override_platform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.layer_ut_utils import init_single_process_dist
from sglang.test.test_utils import CustomTestCase, publish_build_topology

register_cpu_ci(est_time=60, suite="base-a-test-cpu")
BF16 = torch.bfloat16
N, K = 256, 512


def multiply(a, b, a_scale, b_scale, out_dtype, use_8x4_sf_layout=False, backend=""):
    """FlashInfer's product: each scale is read in the layout that the caller names."""
    (m, k), n, tile = a.shape, b.shape[1], 8 if use_8x4_sf_layout else 128
    is_shuffled = backend == "trtllm"
    a_scale = layout.unswizzle_scale(a_scale, m, k // 32, tile)
    b_scale = layout.unswizzle_scale(b_scale, n, k // 32, shuffle=is_shuffled)
    weight = layout.unshuffle_rows(b.t()) if is_shuffled else b.t()
    product = numerics.dequantize(a, a_scale) @ numerics.dequantize(weight, b_scale).T
    return product.to(out_dtype)


def with_output(change):
    """A fault in what the kernel writes."""

    def faulty(*args, **options):
        output = multiply(*args, **options)
        change(output)
        return output

    return faulty


def with_weight_scale(change):
    """A fault in how it reads the weight's scale, [N, K // 32]."""

    def faulty(a, b, a_scale, b_scale, **options):
        plain = layout.unswizzle_scale(b_scale, N, K // 32)
        b_scale = layout.swizzle_scale(change(plain).contiguous())
        return multiply(a, b, a_scale, b_scale, **options)

    return faulty


def without_the_k_tail(a, *args, **options):
    a = a.view(torch.uint8).clone()
    a[:, -32:] = 0
    return multiply(a.view(torch.float8_e4m3fn), *args, **options)


def raises(*args, **options):
    raise RuntimeError("no such kernel image")


def steps(count):
    """One column is off by so many steps of bf16."""

    def change(output):
        column = output.view(torch.int16)[:, 7]
        column += count * (column != 0)

    return with_output(change)


FAULTS = {
    "scale rows shifted by one": with_weight_scale(lambda scale: scale.roll(1, 0)),
    "scales of the neighbour group": with_weight_scale(lambda scale: scale.roll(1, 1)),
    "the K tail dropped": without_the_k_tail,
    "the last 8 rows unwritten": with_output(lambda out: out[-8:].fill_(math.nan)),
    "tiles of N exchanged": with_output(lambda out: out.copy_(out.roll(128, 1))),
    "the first tile only": with_output(lambda out: out[:, 128:].zero_()),
    "three steps off in one column": steps(3),
    "NaN in one element": with_output(lambda out: out[0, 5:6].fill_(math.nan)),
    "a kernel that raises": raises,
}


class Loaded(Exception):
    """The runner has its model, and nothing has read it yet."""


class TestMxfp8CheckedKernels(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_dist()

    def setUp(self):
        self.faults, self.calls = {}, []
        self.multiply.__func__.is_backend_supported = lambda name, sm: True
        patch, patches = mock.patch.object, ExitStack()
        self.addCleanup(patches.close)
        for each in (
            override_platform(is_sm100=True, is_blackwell=True),
            patch(fp8, "is_flashinfer_available", lambda: True),
            patch(fp8_utils, "is_flashinfer_available", lambda: True),
            patch(fp8_utils, "FP8_GEMM_RUNNER_BACKEND", None),
            patch(fp8_utils.deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True),
            patch(flashinfer, "block_scale_interleave", layout.swizzle_scale),
            patch(gemm_kernels, "w8a8_mxfp8_matmul_deepgemm", self.multiply_deepgemm),
            patch(
                quantizers,
                "sglang_per_token_group_quant_fp8",
                lambda x, *_, **__: numerics.quantize(x),
            ),
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

    def quantize(self, input, sf_swizzle_layout=None, **_):
        values, scale = numerics.quantize(input)
        is_8x4 = sf_swizzle_layout == flashinfer.SfLayout.layout_8x4
        return values, layout.swizzle_scale(scale, 8 if is_8x4 else 128)

    def multiply(self, *args, backend, **options):
        self.calls.append(backend)
        run = self.faults.get(backend, multiply)
        return run(*args, backend=backend, **options)

    def multiply_deepgemm(self, a, b, a_scale, b_scale, output_dtype):
        """Its weight's scale is in fp32, as where the GPU has no E8M0."""
        self.calls.append("deep_gemm")
        weight = b.float() * b_scale.repeat_interleave(32, 1)
        return (numerics.dequantize(a, a_scale) @ weight.T).to(output_dtype)

    def build(self, flag="auto", n=N, k=K, seed=0):
        """A loaded linear."""
        for name in ("select_mxfp8_dense_gemm_backend", "trtllm_mxfp8_linear_of"):
            if chosen := getattr(fp8_utils, name, None):
                chosen.cache_clear()
        flag = fp8_utils.Fp8GemmRunnerBackend(flag)
        fp8_utils.FP8_GEMM_RUNNER_BACKEND = flag
        config = Fp8Config(True, weight_block_size=[1, 32], use_mxfp8=True)
        linear = ReplicatedLinear(
            k, n, bias=False, params_dtype=BF16, quant_config=config
        )
        self.write(linear, seed)
        return linear

    def write(self, linear, seed):
        """Load random bytes, which `self.weight` has in fp32."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(*linear.weight.shape, generator=generator).to(BF16)
        weight, scale = numerics.quantize(weight)
        self.weight = numerics.dequantize(weight, scale)
        linear.weight.weight_loader(linear.weight, weight)
        linear.weight_scale_inv.weight_loader(linear.weight_scale_inv, scale)
        DefaultModelLoader.postprocess_weights(linear, torch.device("cpu"))

    def start(self, *linears):
        """What a server's runner does with a loaded model, until anything reads it."""
        runner = mock.MagicMock(device="cpu", gpu_id=0, draft_load_format=None)
        loaded = SimpleNamespace(loader=None, model=torch.nn.ModuleList(linears))
        patch = mock.patch.object
        with patch(model_runner, "build_load_config"), patch(
            model_runner, "adjust_config_with_unaligned_cpu_tp"
        ), patch(
            model_runner, "load_model_with_memory_saver", lambda **_: loaded
        ), patch(
            model_runner.current_platform, "post_load_model", side_effect=Loaded
        ), self.assertRaises(
            Loaded
        ):
            model_runner.ModelRunner.load_model(runner)
        self.assertIs(runner.model, loaded.model)

    def assert_serves(self, linear, backend):
        self.assertEqual(linear.quant_method.mxfp8_dense_backend.value, backend)
        x = torch.randn(5, self.weight.shape[1]).to(BF16)
        is_quantized = backend != "weight_only"
        taken = numerics.dequantize(*numerics.quantize(x)) if is_quantized else x
        wanted = (taken.float() @ self.weight.T).to(BF16)
        torch.testing.assert_close(linear(x)[0], wanted, rtol=0.02, atol=0.1)

    def test_right_kernels_serve(self):
        for flag, k, backend in (
            ("auto", K, "flashinfer_cutedsl"),
            ("flashinfer_cutlass", 288, "flashinfer_cutlass"),
            ("flashinfer_trtllm", K, "flashinfer_trtllm"),
            ("deep_gemm", K, "deep_gemm"),
            ("auto", 96, "weight_only"),
        ):
            with self.subTest(backend), self.assertLogs("sglang", "INFO") as logs:
                linear = self.build(flag, k=k)
                self.start(linear)
                self.assert_serves(linear, backend)
                self.assertRegex(logs.output[-1], "1 kernels are right; .* its bound")

    def test_each_fault_moves_the_layer(self):
        for name, fault in FAULTS.items():
            with self.subTest(name), self.assertLogs("sglang", "WARNING") as logs:
                self.faults = {"cute-dsl": fault}
                linear = self.build()
                self.start(linear)
                self.assert_serves(linear, "flashinfer_cutlass")
                told = r"cutedsl \[256, 512\], M = \d+ is wrong: .*report"
                self.assertRegex(logs.output[0], told)
                self.from_check().self_check._warn.cache_clear()

    def test_a_fault_of_every_product(self):
        self.faults = {"cute-dsl": steps(3), "cutlass": raises}
        linear = self.build()
        self.start(linear)
        self.assert_serves(linear, "weight_only")
        self.write(linear, seed=1)  # an update
        self.assert_serves(linear, "weight_only")

    def test_a_shape_that_the_next_one_refuses(self):
        self.faults = {"cute-dsl": steps(3)}
        linear = self.build(n=1000)
        self.start(linear)
        self.assert_serves(linear, "weight_only")

    def test_a_flag_that_names_a_wrong_backend_stops_the_server(self):
        for (name, fault), backend in itertools.product(
            FAULTS.items(), ("cutlass", "trtllm")
        ):
            with self.subTest(name, backend=backend):
                self.faults = {backend: fault}
                told = rf"{backend} \[256, 512\], M = .*\(on .*flashinfer .*auto"
                with self.assertRaisesRegex(RuntimeError, told):
                    self.start(self.build(f"flashinfer_{backend}"))

    def test_a_layer_that_left_the_named_backend_may_move(self):
        self.faults = {"cute-dsl": steps(3)}
        linear = self.build("flashinfer_trtllm", k=288)
        self.start(linear)
        self.assert_serves(linear, "flashinfer_cutlass")

    def test_a_weight_that_is_shuffled_can_move(self):
        linears = self.from_check().linears
        linear = self.build("flashinfer_trtllm", n=160)
        cutlass = fp8_utils.Mxfp8DenseGemmBackend.FLASHINFER_CUTLASS
        linears.use(linears.Linear(linear), linears.Choice(cutlass))
        self.start(linear)
        self.assert_serves(linear, "flashinfer_cutlass")

    def test_8x4_alone_is_given_up(self):
        def reads_8x4_as_128x4(a, b, a_scale, *args, use_8x4_sf_layout, **options):
            room = torch.full((layout.swizzled_scale_numel(len(a), K // 32),), 127)
            room[: a_scale.numel()] = a_scale
            return multiply(a, b, room.to(torch.uint8), *args, **options)

        self.faults = {"trtllm": reads_8x4_as_128x4}
        linear = self.build("flashinfer_trtllm")
        with self.assertLogs("sglang", "WARNING") as logs:
            self.start(linear)
        self.assertIn("8x4 scales is wrong", logs.output[0])
        self.assertIn("128x4 scales serves instead", logs.output[0])
        self.assert_serves(linear, "flashinfer_trtllm")

    def test_scales_beside_the_checkpoints(self):
        linear = self.build()
        linear.weight_scale_inv_swizzled.data.fill_(120)
        self.start(linear)
        self.assert_serves(linear, "flashinfer_cutlass")
        linear = self.build("deep_gemm")
        linear.weight_scale_inv_deepgemm.data.mul_(2)
        with self.assertRaisesRegex(RuntimeError, r"deep_gemm \[256, 512\]"):
            self.start(linear)

    def test_a_shape_is_checked_once(self):
        linears = [self.build(seed=seed) for seed in range(3)] + [self.build(n=384)]
        self.calls.clear()
        self.start(*linears)
        self.assertEqual(self.calls, ["cute-dsl"] * 8)  # M = 1, 128, 129, 160, twice

    def test_bytes_without_meaning(self):
        """As of --load-format dummy, whose scales are zero."""
        self.faults = {"cute-dsl": FAULTS["the first tile only"]}
        linear = self.build()
        linear.weight_scale_inv.data.zero_()
        linear.quant_method.process_weights_after_loading(linear)
        self.start(linear)
        self.weight.zero_()
        self.assert_serves(linear, "flashinfer_cutlass")
        self.assertFalse(linear.weight_scale_inv.any())

    def test_a_layer_in_its_models_own_form(self):
        self.faults = {"cute-dsl": raises}
        linear = self.build()
        linear.weight_scale_inv.data = torch.zeros(8, K // 32)
        self.calls.clear()
        self.start(linear)
        self.assertEqual(self.calls, [])

    def test_ranks_decide_alike(self):
        """Each of two processes runs `serve_one_rank`; the kernel is wrong on one."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
        ranks = [
            subprocess.Popen([sys.executable, "-W", "ignore", __file__, str(r), port])
            for r in range(2)
        ]
        self.assertEqual([rank.wait(timeout=120) for rank in ranks], [0, 0])

    def test_a_kernel_that_breaks_the_context(self):
        broken = RuntimeError("CUDA error: an illegal memory access")
        with mock.patch.object(
            self.from_check().self_check, "_wait", side_effect=broken
        ), self.assertRaisesRegex(
            RuntimeError, "M = 1 is wrong: .*broke the CUDA context.*fp8-gemm-backend"
        ):
            self.start(self.build())

    def test_it_can_be_left_out(self):
        self.faults = {"cute-dsl": raises}
        with mock.patch.dict(os.environ, SGLANG_MXFP8_SELF_CHECK="0"):
            linear = self.build()
            self.start(linear)
        self.assertEqual(
            linear.quant_method.mxfp8_dense_backend.value, "flashinfer_cutedsl"
        )

    def test_a_models_shapes_without_its_weights(self):
        config = dict(architectures=["LlamaForCausalLM"], model_type="llama")
        config.update(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
        config.update(num_attention_heads=4, num_key_value_heads=4, vocab_size=64)
        config.update(torch_dtype="bfloat16")
        command = [sys.executable, "-W", "ignore", "-m"]
        command += ["sglang.srt.layers.quantization.mxfp8.self_check", "--tp", "2"]
        with TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            command += ["--model", folder]
            result = subprocess.run(
                command, text=True, capture_output=True, env=os.environ
            )
        self.assertEqual(result.returncode, 0, result.stderr[-2000:])
        for shape in "[384, 256]", "[256, 128]", "[512, 256]", "[256, 256]":
            self.assertIn(shape, result.stdout)

    @staticmethod
    def from_check():
        from sglang.srt.layers.quantization.mxfp8 import linears, self_check

        return SimpleNamespace(linears=linears, self_check=self_check)


def serve_one_rank(rank, port):
    parallel_state.init_distributed_environment(
        world_size=2,
        rank=rank,
        local_rank=rank,
        backend="gloo",
        distributed_init_method=f"tcp://127.0.0.1:{port}",
    )
    publish_build_topology(world_rank=rank, tp_size=2)
    with mock.patch.object(pynccl, "PyNcclCommunicator"):
        parallel_state.initialize_model_parallel(backend="gloo")
    case = TestMxfp8CheckedKernels()
    case.setUp()
    case.faults = {"cute-dsl": raises} if rank else {}
    linear = case.build()
    case.start(linear)
    case.assert_serves(linear, "flashinfer_cutlass")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve_one_rank(*map(int, sys.argv[1:]))
    else:
        unittest.main()
