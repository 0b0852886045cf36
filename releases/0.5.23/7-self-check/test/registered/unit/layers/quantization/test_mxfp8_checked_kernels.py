"""A server finds wrong MXFP8 kernels before anything reads its model. Faults are planted in
the plain torch that stands for FlashInfer and DeepGEMM."""

import itertools
import json
import math
import os
import subprocess
import sys
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch

import sglang.kernels.ops.gemm.fp8_kernel as gemm_kernels
import sglang.kernels.ops.quantization.fp8_kernel as quantizers
from sglang.srt.layers.quantization.mxfp8 import layout, numerics
from sglang.srt.model_executor import model_runner
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_linears import (
    decoded,
    load,
    loaded_linear,
    on_gpu,
    random_mxfp8,
)
from sglang.test.mxfp8_products import mm_mxfp8, mxfp8_quantize, through_mxfp8
from sglang.test.test_utils import CustomTestCase
from sglang.test.two_ranks import run_on_two_ranks

register_cpu_ci(est_time=60, suite="base-a-test-cpu")
BF16 = torch.bfloat16
N, K = 256, 512


def with_output(change):
    """A fault in what the kernel writes."""

    def faulty(*args, **options):
        output = mm_mxfp8(*args, **options)
        change(output)
        return output

    return faulty


def with_scale_from(distance):
    """It reads the weight's scales so many bytes from where they are, in tiles of which each
    row has 16 bytes."""

    def faulty(a, b, a_scale, b_scale, **options):
        return mm_mxfp8(a, b, a_scale, b_scale.roll(distance), **options)

    return faulty


def without_the_k_tail(a, *args, **options):
    a = a.view(torch.uint8).clone()
    a[:, -32:] = 0
    return mm_mxfp8(a.view(torch.float8_e4m3fn), *args, **options)


def raises(*args, **options):
    raise RuntimeError("no such kernel image")


def three_steps_off(output):
    column = output.view(torch.int16)[:, 7]
    column += 3 * (column != 0)


STEPS = with_output(three_steps_off)
FAULTS = {
    "scale rows shifted by one": with_scale_from(16),
    "scales of the neighbour group": with_scale_from(1),
    "the K tail dropped": without_the_k_tail,
    "the last 8 rows unwritten": with_output(lambda out: out[-8:].fill_(math.nan)),
    "tiles of N exchanged": with_output(lambda out: out.copy_(out.roll(128, 1))),
    "the first tile only": with_output(lambda out: out[:, 128:].zero_()),
    "three steps off in one column": STEPS,
    "NaN in one element": with_output(lambda out: out[0, 5:6].fill_(math.nan)),
    "a kernel that raises": raises,
}


class Loaded(Exception):
    """The runner has its model, and nothing has read it yet."""


class TestMxfp8CheckedKernels(CustomTestCase):
    def build(self, flag="auto", n=N, k=K, seed=0, **faults):
        """A loaded linear, with its weight in fp32; `faults` are in FlashInfer's product by
        the name of its backend."""
        self.calls = []

        def multiply(*args, backend, **options):
            self.calls.append(backend)
            run = faults.get(backend.replace("-", ""), mm_mxfp8)
            return run(*args, backend=backend, **options)

        def multiply_deepgemm(a, b, a_scale, b_scale, output_dtype):
            """Its weight's scale is in fp32, as where the GPU has no E8M0."""
            weight = b.float() * b_scale.repeat_interleave(32, 1)
            return (numerics.dequantize(a, a_scale) @ weight.T).to(output_dtype)

        patch, take = mock.patch.multiple, self.enterContext
        take(on_gpu(100, flag, mm_mxfp8=multiply, mxfp8_quantize=mxfp8_quantize))
        take(patch(gemm_kernels, w8a8_mxfp8_matmul_deepgemm=multiply_deepgemm))
        quantize = mock.Mock(side_effect=lambda x, *_, **__: numerics.quantize(x))
        take(patch(quantizers, sglang_per_token_group_quant_fp8=quantize))
        return loaded_linear(n, k, seed)

    def start(self, *linears):
        """What a server's runner does with a loaded model, until anything reads it."""
        runner = mock.MagicMock(device="cpu", gpu_id=0, draft_load_format=None)
        loaded = SimpleNamespace(loader=None, model=torch.nn.ModuleList(linears))
        with (
            mock.patch.multiple(
                model_runner,
                build_load_config=mock.DEFAULT,
                adjust_config_with_unaligned_cpu_tp=mock.DEFAULT,
                load_model_with_memory_saver=lambda **_: loaded,
            ),
            mock.patch.object(
                model_runner.current_platform, "post_load_model", side_effect=Loaded
            ),
            self.assertRaises(Loaded),
        ):
            model_runner.ModelRunner.load_model(runner)
        self.assertIs(runner.model, loaded.model)

    def assert_serves(self, linear, weight, backend):
        self.assertEqual(linear.quant_method.mxfp8_dense_backend.value, backend)
        x = torch.randn(5, weight.shape[1]).to(BF16)
        taken = x.float() if backend == "weight_only" else through_mxfp8(x)
        wanted = (taken @ weight.T).to(BF16)
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
                linear, weight = self.build(flag, k=k)
                self.start(linear)
                self.assert_serves(linear, weight, backend)
                self.assertRegex(logs.output[-1], "1 kernels are right; .* its bound")

    def test_a_wrong_kernel_is_replaced(self):
        """By the next one that takes the shape, before and after an update."""
        cases = [(dict(cutedsl=fault), {}, "cutlass") for fault in FAULTS.values()]
        cases += [
            (dict(cutedsl=STEPS, cutlass=raises), {}, "weight_only"),
            (dict(cutedsl=STEPS), dict(n=1000), "weight_only"),
            (dict(cutedsl=STEPS), dict(k=288, flag="flashinfer_trtllm"), "cutlass"),
        ]
        for faults, options, backend in cases:
            with self.subTest(faults=faults, **options):
                linear, weight = self.build(**options, **faults)
                self.start(linear)
                backend = backend.replace("cutlass", "flashinfer_cutlass")
                self.assert_serves(linear, weight, backend)
                new = random_mxfp8(*weight.shape, seed=1)
                load(linear, *new)
                self.assert_serves(linear, decoded(*new), backend)

    def test_a_flag_that_names_a_wrong_backend_stops_the_server(self):
        for (name, fault), backend in itertools.product(
            FAULTS.items(), ("cutlass", "trtllm")
        ):
            with self.subTest(name, backend=backend):
                linear, _ = self.build(f"flashinfer_{backend}", **{backend: fault})
                told = rf"{backend} \[256, 512\], M = .*\(on .*flashinfer .*auto"
                with self.assertRaisesRegex(RuntimeError, told):
                    self.start(linear)

    def test_8x4_alone_is_given_up(self):
        def reads_8x4_as_128x4(a, b, a_scale, *args, use_8x4_sf_layout, **options):
            room = torch.full((layout.swizzled_scale_numel(len(a), K // 32),), 127)
            room[: a_scale.numel()] = a_scale
            return mm_mxfp8(a, b, room.to(torch.uint8), *args, **options)

        linear, weight = self.build("flashinfer_trtllm", trtllm=reads_8x4_as_128x4)
        with self.assertLogs("sglang", "WARNING") as logs:
            self.start(linear)
        told = "8x4 scales is wrong.* 128x4 scales serves instead. Please report"
        self.assertRegex("\n".join(logs.output), told)
        self.assert_serves(linear, weight, "flashinfer_trtllm")

    def test_scales_beside_the_checkpoints(self):
        linear, weight = self.build()
        linear.weight_scale_inv_swizzled.data.fill_(120)
        self.start(linear)
        self.assert_serves(linear, weight, "flashinfer_cutlass")
        linear, _ = self.build("deep_gemm")
        linear.weight_scale_inv_deepgemm.data.mul_(2)
        with self.assertRaisesRegex(RuntimeError, r"deep_gemm \[256, 512\]"):
            self.start(linear)

    def test_a_shape_is_checked_once(self):
        linears = [self.build(n=n)[0] for n in (N, N, N, 384)]
        self.start(*linears)
        self.assertEqual(self.calls, ["cute-dsl"] * 8)  # M = 1, 128, 129, 160, twice

    def test_bytes_without_meaning(self):
        """As of --load-format dummy, whose scales are zero."""
        linear, weight = self.build(cutedsl=FAULTS["the first tile only"])
        zeros = torch.zeros_like(linear.weight_scale_inv)
        load(linear, linear.weight.data.clone(), zeros)
        self.start(linear)
        self.assert_serves(linear, torch.zeros_like(weight), "flashinfer_cutlass")
        self.assertFalse(linear.weight_scale_inv.any())

    def test_what_is_left_alone(self):
        """A layer in its model's own form, and all if the server is told so."""
        linear, _ = self.build(cutedsl=raises)
        with mock.patch.dict(os.environ, SGLANG_MXFP8_SELF_CHECK="0"):
            self.start(linear)
        linear.weight_scale_inv.data = torch.zeros(8, K // 32)
        self.start(linear)
        self.assertEqual(self.calls, [])

    def test_ranks_decide_alike(self):
        run_on_two_ranks(serve_one_rank)

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
            result = subprocess.run(command, text=True, capture_output=True)
        self.assertEqual(result.returncode, 0, result.stderr[-2000:])
        for shape in "[384, 256]", "[256, 128]", "[512, 256]", "[256, 256]":
            self.assertIn(shape, result.stdout)


def serve_one_rank(rank: int) -> None:
    """The kernel is wrong on one of them."""
    case = TestMxfp8CheckedKernels()
    linear, weight = case.build(**({"cutedsl": raises} if rank else {}))
    case.start(linear)
    case.assert_serves(linear, weight, "flashinfer_cutlass")
    case.doCleanups()


if __name__ == "__main__":
    unittest.main()
