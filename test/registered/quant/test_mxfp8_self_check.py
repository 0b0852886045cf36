"""Kernels with planted faults, and what a server does about each before it answers."""

import math
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import emulation, layout, routing, self_check
from sglang.srt.layers.quantization.mxfp8.routing import CUTLASS, TRTLLM, WEIGHT_ONLY
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    load_mxfp8,
    loaded_mxfp8_linear,
    mxfp8_linear,
    random_mxfp8,
    reference_linear,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=40, suite="default")

N, K = 256, 512


def multiply(a, b, a_scale, b_scale, use_8x4_sf_layout=False, **options):
    options["use_8x4_sf_layout"] = use_8x4_sf_layout
    return emulation.mm_mxfp8(a, b, a_scale, b_scale, **options)


def with_output(change):
    """A fault in what the kernel writes."""

    def faulty(*args, **options):
        output = multiply(*args, **options)
        change(output)
        return output

    return faulty


def with_scales(change, which):
    """A fault in how it reads the scale, [rows, groups], of the input (0) or weight (1)."""

    def faulty(a, b, *scales, **options):
        scales, rows = list(scales), (a.shape[0], b.shape[1])[which]
        tile = 8 if options["use_8x4_sf_layout"] and which == 0 else 128
        plain = layout.unswizzle_scale(scales[which], rows, K // 32, tile)
        scales[which] = layout.swizzle_scale(change(plain).contiguous(), tile)
        return multiply(a, b, *scales, **options)

    return faulty


def rows_not_shuffled(a, b, *scales, **options):
    shuffled_twice = layout.shuffle_rows(b.t().contiguous()).t()
    return multiply(a, shuffled_twice, *scales, **options)


def reads_8x4_as_128x4(a, b, a_scale, b_scale, use_8x4_sf_layout, **options):
    length = layout.swizzled_scale_numel(a.shape[0], K // 32)
    a_scale = torch.nn.functional.pad(a_scale, (0, length - a_scale.numel()), value=127)
    return multiply(a, b, a_scale, b_scale, **options)


def only_columns(a, start, end):
    """`a` with zeros everywhere else."""
    column = torch.arange(a.shape[1])
    outside = (column < start) | (column >= end)
    return a.view(torch.uint8).masked_fill(outside, 0).view(a.dtype)


def without_the_k_tail(a, *args, **options):
    return multiply(only_columns(a, 0, a.shape[1] - 32), *args, **options)


def with_fp16_sums(a, *args, **options):
    total = 0
    for start in range(0, K, 32):
        product = multiply(only_columns(a, start, start + 32), *args, **options)
        total = (total + product.half()).half()
    return total.bfloat16()


def reads_padded_columns(a, b, a_scale, b_scale, **options):
    """As a kernel that reads whole tiles of scales: zero times what padding holds."""
    groups = a.shape[1] // 32
    whole = layout.align(groups, layout.SCALE_GROUP_TILE)
    padding = layout.unswizzle_scale(a_scale, a.shape[0], whole)[:, groups:]
    as_numbers = padding.bfloat16().masked_fill(padding == 255, math.nan)
    return multiply(a, b, a_scale, b_scale, **options) + 0.0 * as_numbers.sum()


def raises(*args, **options):
    raise RuntimeError("no such kernel image")


def steps(count):
    def change(output):
        column = output.view(torch.int16)[:, 7]
        column += count * (column != 0)

    return with_output(change)


FAULTS = {
    "rows not shuffled": rows_not_shuffled,
    "scale rows shifted by one": with_scales(lambda scale: scale.roll(1, 0), 1),
    "scales of the neighbour group": with_scales(lambda scale: scale.roll(1, 1), 0),
    "the K tail dropped": without_the_k_tail,
    "the last 8 rows unwritten": with_output(lambda out: out[-8:].fill_(math.nan)),
    "fp16 accumulation": with_fp16_sums,
    "tiles of N exchanged": with_output(lambda out: out.copy_(out.roll(128, 1))),
    "the first tile only": with_output(lambda out: out[:, 128:].zero_()),
    "three steps off in one column": steps(3),
    "NaN in one element": with_output(lambda out: out[0, 5:6].fill_(math.nan)),
    "a kernel that raises": raises,
}


class TestSelfCheck(CustomTestCase):
    """FlashInfer's backends emulated, as on a machine without a GPU."""

    @classmethod
    def setUpClass(cls):
        cls.enterClassContext(mock.patch.object(routing, "is_cuda", lambda: False))

    def check(self, fault, flag="auto", k=K, backends="trtllm", gather=None):
        """A layer after the check of its kernel, which is faulty on the backends that are
        named; multiplies rightly, or the test fails."""

        def product(*args, **options):
            is_faulty = options["backend"] in backends
            return (fault if is_faulty else multiply)(*args, **options)

        kernels = emulation.mxfp8_quantize, product
        self_check._warn.cache_clear()
        with mock.patch.object(fp8_utils, "_kernels", lambda _: kernels):
            layer, weight, scale = loaded_mxfp8_linear(N, k, flag)
            weights = layer.mxfp8_weights
            self_check.check_kernels([weights], gather or (lambda x: [x]))
            x = torch.randn(5, k).bfloat16()
            quantized = not weights.backend.is_weight_only()
            expected = reference_linear(x, weight, scale, quantized).bfloat16()
            torch.testing.assert_close(layer(x)[0], expected, rtol=0.02, atol=0.05)
        return weights

    def test_right_kernels_pass(self):
        for k in K, 288:
            with self.assertLogs("sglang", "INFO") as logs:
                self.check(multiply, k=k)
            self.assertRegex(logs.output[-1], "1 kernels are right; .* of its bound")
        for one_step in 1, -1:  # is rounding
            self.assertEqual(self.check(steps(one_step)).backend, TRTLLM)

    def test_each_fault_moves_the_layer_to_the_next_backend(self):
        for name, fault in FAULTS.items():
            with self.subTest(name), self.assertLogs("sglang", "WARNING") as logs:
                self.assertEqual(self.check(fault).backend, CUTLASS)
            told = r"trtllm \[256, 512\], M = \d+.* is wrong: .*report"
            self.assertRegex(logs.output[0], told)
        weights = self.check(steps(3), backends="trtllm cutlass")
        self.assertEqual(weights.backend, WEIGHT_ONLY)
        self.assertRegex(weights.choice.reason, "cutlass .* is wrong")

    def test_a_wrong_backend_that_was_named_stops_the_server(self):
        reason = r"trtllm \[256, 512\], M = .*(flashinfer .*).*backend auto"
        with self.assertRaisesRegex(RuntimeError, reason):
            self.check(raises, "flashinfer_trtllm")
        with envs.SGLANG_MXFP8_LINEAR_BACKEND.override("proj=flashinfer_trtllm"):
            with self.assertRaisesRegex(RuntimeError, "another backend for"):
                self.check(raises)

    def test_8x4_alone_is_given_up(self):
        def wrong_with_8x4(*args, **options):
            is_wrong = options["use_8x4_sf_layout"]
            return (reads_8x4_as_128x4 if is_wrong else multiply)(*args, **options)

        for flag in "auto", "flashinfer_trtllm":
            with self.assertLogs("sglang", "WARNING") as logs:
                weights = self.check(wrong_with_8x4, flag)
            self.assertEqual((weights.backend, weights.choice.max_m_8x4), (TRTLLM, 0))
            self.assertIn("8x4 scales is wrong", logs.output[0])

    def test_padding_that_is_not_zero(self):
        quantize = emulation.mxfp8_quantize

        def with_padding(x, use_8x4_sf_layout=False):
            values, scale = quantize(x, use_8x4_sf_layout)
            ones = torch.ones(x.shape[0], x.shape[1] // 32, dtype=torch.uint8)
            return values, scale.masked_fill(layout.swizzle_scale(ones) == 0, 255)

        for quantizer, expected in (quantize, CUTLASS), (with_padding, WEIGHT_ONLY):
            with mock.patch.object(emulation, "mxfp8_quantize", quantizer):
                weights = self.check(reads_padded_columns, k=288, backends="cutlass")
            self.assertEqual(weights.backend, expected)

    def test_what_another_rank_found_counts_here(self):
        run = mock.Mock(side_effect=self_check.run_kernel)
        bad = self_check.Result(129, failure="RuntimeError('there')")
        calls = []

        def gather(wrong):
            calls.append(wrong)
            there = {run.call_args.args[0]: [bad]} if len(calls) == 1 else {}
            return [wrong, there]

        with mock.patch.object(self_check, "run_kernel", run):
            weights = self.check(multiply, gather=gather)
        self.assertEqual((weights.backend, len(calls)), (CUTLASS, 2))

    def test_a_shape_is_checked_once_and_blank_bytes_are_replaced(self):
        made = mock.Mock(side_effect=self_check.random_weights)
        run = mock.Mock(side_effect=self_check.run_kernel)
        with mock.patch.multiple(self_check, random_weights=made, run_kernel=run):
            weights = self.check(multiply)
            made.assert_not_called()
            run.reset_mock()
            self_check.check_kernels([weights, weights], lambda x: [x])
            self.assertEqual(run.call_count, 1)
            weights.layer.weight_scale_inv.data.zero_()
            self_check.check_kernels([weights], lambda x: [x])
            made.assert_called_once()

    def test_a_kernel_that_breaks_the_context_ends_the_start(self):
        broken = RuntimeError("CUDA error: an illegal memory access")
        reason = r"\[256, 512\], M = 1.*broke the CUDA context"
        with mock.patch.object(self_check, "_wait", side_effect=broken):
            with self.assertRaisesRegex(RuntimeError, reason):
                self.check(multiply)

    def test_a_models_shapes_without_its_weights(self):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, {}, intermediate_size=1024)
            command = [sys.executable, "-W", "ignore", "-m", self_check.__name__]
            command += ["--model", folder, "--tp", "2"]
            command += ["--fp8-gemm-backend", "flashinfer_trtllm"]
            with envs.SGLANG_MXFP8_EMULATION.override(True):
                result = subprocess.run(command, text=True, capture_output=True)
        self.assertEqual(result.returncode, 0, result.stderr[-2000:])
        self.assertRegex(result.stdout, r"flashinfer_trtllm .*\n.*129 +128x4")


@unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
class TestWeightOnlyOnAGpu(CustomTestCase):
    """The layer that a GPU without MXFP8 products serves with, checked and compiled."""

    def layer(self):
        with torch.device("cuda"):
            layer = mxfp8_linear(6144, 4096, "auto")
        self.load(layer, seed=0)
        layer.quant_method.process_weights_after_loading(layer)
        self.assertEqual(layer.mxfp8_weights.backend, WEIGHT_ONLY)
        return layer

    def load(self, layer, seed: int) -> None:
        tensors = random_mxfp8(*layer.weight.shape, seed)[1:]
        load_mxfp8(layer, *(tensor.cuda() for tensor in tensors))

    def test_its_kernels_are_right(self):
        self_check.check_kernels([self.layer().mxfp8_weights], lambda x: [x])

    def test_planted_faults_stop_the_start(self):
        linear = fp8_utils.weight_only_linear

        def three_steps_off(*args):
            output = linear(*args)
            output.view(torch.int16)[:, 7] += 3
            return output

        def unwritten_rows(*args):
            output = linear(*args)
            output[-8:] = math.nan
            return output

        for fault in three_steps_off, unwritten_rows, raises:
            with self.subTest(fault.__name__):
                faulty = mock.patch.object(fp8_utils, "weight_only_linear", fault)
                reason = "weight_only .* is wrong"
                with faulty, self.assertRaisesRegex(RuntimeError, reason):
                    self.test_its_kernels_are_right()

    def test_torch_compile_and_graphs_see_an_update(self):
        layer = self.layer()
        compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True)
        for m in 1, 16, 600:
            x = torch.randn(m, 4096, device="cuda").bfloat16()
            self.assertTrue(torch.equal(compiled(x), layer(x)[0]))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = layer(x)[0]
            self.load(layer, seed=m)
            graph.replay()
            self.assertTrue(torch.equal(output, layer(x)[0]))


if __name__ == "__main__":
    unittest.main()
