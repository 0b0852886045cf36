"""x @ W^T with an MXFP8 weight in checkpoint form: plain torch, and the Triton kernels."""

import textwrap
import unittest
from unittest import mock

import torch

from sglang.srt.layers.quantization.mxfp8 import weight_only
from sglang.srt.layers.quantization.mxfp8 import weight_only_kernel as kernel
from sglang.srt.layers.quantization.mxfp8.numerics import SMALLEST_NORMAL
from sglang.srt.layers.quantization.mxfp8.weight_only import weight_only_linear
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci
from sglang.test.lone_kernel import compiled, run_interpreted
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")
register_cuda_ci(est_time=60, suite="nightly-1-gpu", nightly=True)

EVERY_M = (1, 2, 3, 16, 17, 40, 100, 130)  # each tiling, with and without a rest


def in_float64(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 [N, K] times its scales, from the formats' definitions."""
    code = weight.view(torch.uint8).int()
    exponent, mantissa = code >> 3 & 15, (code & 7).double()
    value = torch.where(exponent > 0, mantissa + 8, mantissa)
    value = torch.ldexp(value, exponent.clamp(min=1) - 10)
    value = torch.where(code > 127, -value, value)
    value[code & 127 == 127] = float("nan")
    factor = torch.ldexp(torch.ones_like(scale, dtype=torch.float64), scale.int() - 127)
    factor[scale == 255] = float("nan")
    return value * factor.repeat_interleave(32, dim=1)


def every_code_and_scale(k: int):
    """A row for each pair of a code and a scale byte, the code among zeros."""
    row = torch.arange(1 << 16)
    weight = torch.zeros(1 << 16, k, dtype=torch.uint8)
    weight[row, row * 7 % k] = (row % 256).to(torch.uint8)
    scale = (row // 256).to(torch.uint8)[:, None].repeat(1, k // 32)
    return weight.view(torch.float8_e4m3fn), scale


def random_operands(m, n, k, dtype=torch.bfloat16, room: int = 0, device="cpu"):
    """x, weight and scale whose rows are `room` groups longer than K."""
    wide = k + 32 * room
    x = torch.randn(m, wide, device=device).to(dtype)[:, :k]
    weight = torch.randn(n, wide, device=device).to(torch.float8_e4m3fn)[:, :k]
    groups = (n, wide // 32)
    scale = torch.randint(117, 124, groups, dtype=torch.uint8, device=device)
    return x, weight, scale[:, : k // 32]


class WeightOnlyTest(CustomTestCase):
    def check_close(self, output, x, weight, scale, by_slabs: bool = False):
        """Against float64: the output's rounding, and that of the sums in fp32.

        torch, which multiplies by slabs, may round the sums of parts of K as well.
        """
        exact = in_float64(weight, scale)
        expected = x.double() @ exact.t()
        self.assertEqual(output.dtype, x.dtype)
        self.assertEqual(output.shape, expected.shape)
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0}
        sizes = (x.double().abs() @ exact.abs().t()).norm()
        limit = rounding[x.dtype] * expected.norm() + 1e-6 * sizes
        if by_slabs:
            limit += rounding[x.dtype] * sizes
        error = (output.double() - expected).norm()
        self.assertLess(float(error), float(limit), (list(x.shape), len(weight)))

    def check_every_code_and_scale(self, device: str, max_m: int):
        """The rules that the module states, with x of ones: a row's only weight."""
        for k in (32, 544):
            weight, scale = every_code_and_scale(k)
            exact = in_float64(weight, scale).sum(dim=1)
            byte = scale[:, 0]
            weight, scale = weight.to(device), scale.to(device)
            for dtype in (torch.bfloat16, torch.float16):
                # Through fp32, which holds all of them or is as infinite.
                expected = exact.float().to(dtype)
                for m in (1, 2, 17, 40, 100) if device == "cuda" else (1,):
                    x = torch.ones(m, k, dtype=dtype, device=device)
                    output = weight_only_linear(x, weight, scale, max_m).cpu()
                    is_in_range = torch.ones_like(byte, dtype=torch.bool)
                    if dtype == torch.float16:
                        is_in_range = ((byte >= 95) & (byte < 135)) | (byte == 255)
                        below = output[:, byte < 95] - expected[byte < 95]
                        self.assertLessEqual(
                            float(below.nan_to_num(0).abs().max()), 2**-24
                        )
                    found, wanted = output[:, is_in_range], expected[is_in_range]
                    is_same = (found == wanted) | (found.isnan() & wanted.isnan())
                    if device == "cpu":  # whose products flush subnormals to zero
                        is_same |= (found == 0) & (wanted.abs() < SMALLEST_NORMAL)
                    self.assertTrue(bool(is_same.all()), (k, dtype, m))


class TestMXFP8WeightOnlyTorch(WeightOnlyTest):
    def test_every_code_with_every_scale(self):
        self.check_every_code_and_scale("cpu", 0)

    def test_shapes_types_and_leading_dimensions(self):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for m, n, k in ((1, 1, 32), (3, 1000, 96), (70, 130, 544)):
                operands = random_operands(m, n, k, dtype, room=m % 2)
                self.check_close(weight_only_linear(*operands, 64), *operands, True)
                with mock.patch.object(weight_only, "MAX_SLAB_BYTES", 1):
                    in_slabs = weight_only_linear(*operands, 0)
                self.check_close(in_slabs, *operands, True)

    def test_no_rows(self):
        x, weight, scale = random_operands(4, 8, 64)
        self.assertEqual(weight_only_linear(x[:0], weight, scale, 64).shape, (0, 8))
        output = weight_only_linear(x, weight[:0], scale[:0], 64)
        self.assertEqual(output.shape, (4, 0))


class TestMXFP8WeightOnlyKernel(CustomTestCase):
    """The Triton kernels where there is no GPU: interpreted, and compiled for one."""

    # The interpreter turns tensors to numbers in a way that numpy has since given up.
    INTERPRETED = """
        import torch
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor, *scope):
            patch(tensor, *scope)
            tensor.__index__ = lambda self: self.handle.data.item()

        interpreter._patch_lang_tensor = patched

        def decoded(weight, scale):
            values = weight.view(torch.float8_e4m3fn).double()
            factor = 2.0 ** (scale.double() - 127)
            factor[scale == 255] = float("nan")
            return values * factor.repeat_interleave(32, dim=1)
    """

    def interpret(self, script: str) -> None:
        text = textwrap.dedent(self.INTERPRETED) + textwrap.dedent(script)
        run_interpreted(self, "weight_only_kernel", text)

    def test_interpreted_products(self):
        # K in parts, rests of M, N and K, and rows that are longer than K.
        self.interpret("""
            parts = set()
            kernel._multiprocessors = lambda device: (40, 1 << 20)
            small, large = kernel.TILINGS, kernel.LARGE
            any = [each for each in small if each[1] == kernel.ANY]
            for kernel.TILINGS, kernel.LARGE in ((small, large), (any, large), (any, 0)):
                for m, n, k in (
                    (1, 1, 32), (1, 9, 544), (1, 5, 3072), (3, 9, 544),
                    (6, 33, 160), (16, 40, 4096), (17, 65, 96), (33, 100, 2016),
                    (65, 70, 544), (100, 30, 2048), (130, 66, 96),
                ):
                    weight = torch.randint(0, 127, (n, k + 64), dtype=torch.uint8)
                    scale = torch.randint(117, 123, (n, k // 32 + 3), dtype=torch.uint8)
                    x = torch.randn(m, k + 8)
                    # What lies behind K is NaN.
                    weight[:, k:], scale[:, k // 32 :], x[:, k:] = 127, 255, float("nan")
                    weight, scale, x = weight[:, :k], scale[:, : k // 32], x[:, :k]
                    exact = decoded(weight, scale)
                    error = kernel.fused(x, weight, scale) - x.double() @ exact.t()
                    sizes = x.double().abs() @ exact.abs().t()
                    assert error.norm() < 1e-6 * sizes.norm(), (m, n, k)
                    parts.add(kernel.tiling_and_parts(m, n, k, 40, 1 << 20)[1])
            assert len(parts) > 2, parts
            """)

    def test_interpreted_decoding_of_every_code_and_scale(self):
        self.interpret("""
            weight = torch.arange(288).repeat(256, 1).to(torch.uint8)
            scale = torch.arange(256)[:, None].repeat(1, 9).to(torch.uint8)
            out = torch.empty(256, 288)
            kernel.decode_into(out, weight, scale)
            expected = decoded(weight, scale).float()
            assert torch.equal(out.nan_to_num(7e7), expected.nan_to_num(7e7))
            assert torch.equal(out.isnan(), expected.isnan())
            """)

    def compiled(self, function, arch, dtype, warps=4, **constants):
        """Of a launch with aligned arguments, with the decoder that the GPU has."""
        types = dict(w="*u8", s="*u8", partial="*fp32", counters="*i32")
        types.update(x=f"*{dtype}", out=f"*{dtype}")
        aligned = {"x", "w", "s", "out", "partial", "N", "K"}
        aligned |= {"stride_x", "stride_w", "stride_s"}
        constants["DECODE"] = "native" if arch >= 89 else "integer"
        made = compiled(function, arch, warps, types, aligned, **constants)
        if arch < 89:
            self.assertNotIn("e4m3", made.asm["ptx"])
        # SM86, SM89 and SM120 have the least: 99 KiB a block.
        has_room = arch in (80, 90, 100)
        room = kernel.LARGE_SHARED if has_room else 99 << 10
        self.assertLessEqual(made.metadata.shared, room)
        return made

    def test_what_ships_compiles_for_every_gpu(self):
        tilings = [tiling for *_, tiling in kernel.TILINGS]
        for arch, dtype, of_dots in (
            (80, "bf16", [*tilings, kernel.LARGE_TILING]),
            (86, "bf16", tilings),
            (89, "bf16", tilings),
            (90, "bf16", [*tilings, kernel.LARGE_TILING]),
            (100, "bf16", [*tilings, kernel.LARGE_TILING]),
            (120, "bf16", tilings),
            (80, "fp16", tilings[:1]),
            (90, "fp16", tilings[:1]),
        ):
            with self.subTest(arch=arch, dtype=dtype):
                rows = dict(BN=4, BK=2048, EVEN=True)
                self.compiled(kernel._sum_kernel, arch, dtype, **rows)
                self.compiled(kernel._decode_kernel, arch, dtype, BN=16, BK=256)
                for each in of_dots:
                    made = self.compiled(
                        kernel._dot_kernel,
                        *(arch, dtype, each.warps),
                        BM=each.bm,
                        BN=each.bn,
                        BK=each.bk,
                        WEIGHT_LEFT=each.weight_left,
                        STAGES=each.stages,
                        WARPS=each.warps,
                        EVEN=True,
                    )
                    self.assertIn("mma", made.asm["ptx"])
                    self.assertIn("cp.async", made.asm["ptx"])


@unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
class TestMXFP8WeightOnlyCUDA(WeightOnlyTest):
    def on_gpu(self, *arguments, **more):
        return random_operands(*arguments, **more, device="cuda")

    def with_decoder(self, name: str):
        return mock.patch.object(kernel, "_decoder", lambda device: name)

    def decoders(self):
        native = torch.cuda.get_device_capability() >= (8, 9)
        return ("integer", "native") if native else ("integer",)

    def test_every_code_with_every_scale(self):
        for name in self.decoders():
            for max_m in (1000, 0):  # in the product, and slab by slab
                with self.subTest(name, max_m=max_m), self.with_decoder(name):
                    self.check_every_code_and_scale("cuda", max_m)

    def test_shapes_types_and_leading_dimensions(self):
        shapes = ((1, 32), (33, 96), (1000, 544), (768, 4096), (4160, 4128))
        for name in self.decoders():
            for dtype in (torch.bfloat16, torch.float16):
                for n, k in shapes:
                    for m in EVERY_M:
                        operands = self.on_gpu(m, n, k, dtype, room=m % 2)
                        with self.with_decoder(name):
                            for max_m in (1000, 0):
                                output = weight_only_linear(*operands, max_m)
                                self.check_close(output, *operands, max_m == 0)

    def test_the_same_bits_each_time_and_on_every_stream(self):
        for m in EVERY_M:
            operands = self.on_gpu(m, 768, 4096)
            first = weight_only_linear(*operands, 1000)
            for _ in range(20):
                again = weight_only_linear(*operands, 1000)
                self.assertTrue(torch.equal(again, first), m)
            torch.cuda.synchronize()
            streams = [torch.cuda.Stream() for _ in range(20)]
            for stream in streams * 3:
                with torch.cuda.stream(stream):
                    again = weight_only_linear(*operands, 1000)
                stream.synchronize()
                self.assertTrue(torch.equal(again, first), m)

    def test_graph_reads_a_weight_written_after_its_capture(self):
        for m, max_m in ((1, 1000), (16, 1000), (64, 1000), (300, 0)):
            operands = self.on_gpu(m, 768, 4096)
            weight_only_linear(*operands, max_m)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = weight_only_linear(*operands, max_m)
            for old, new in zip(operands, self.on_gpu(m, 768, 4096)):
                old.copy_(new)
            for _ in range(3):
                graph.replay()
            self.check_close(output, *operands, max_m == 0)

    def test_more_than_2_to_the_31_codes(self):
        n, k = 65792, 32768
        if torch.cuda.mem_get_info()[0] < 2 * n * k:
            self.skipTest(f"needs {2 * n * k} bytes of device memory")
        weight = torch.randint(0, 127, (n, k), dtype=torch.uint8, device="cuda")
        weight = weight.view(torch.float8_e4m3fn)
        scale = torch.full((n, k // 32), 120, dtype=torch.uint8, device="cuda")
        for m, max_m in ((1, 1000), (16, 1000), (64, 0)):
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            output = weight_only_linear(x, weight, scale, max_m)
            end = slice(n - 40, n)
            self.check_close(output[:, end], x, weight[end], scale[end], max_m == 0)


if __name__ == "__main__":
    unittest.main()
