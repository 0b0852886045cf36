"""The layouts of FlashInfer's MXFP8 GEMMs: FlashInfer's own helpers, and inverses."""

import unittest
from unittest import mock

import torch

from sglang.srt.layers.quantization.mxfp8 import layout, shuffle_kernel
from sglang.test.ci.ci_register import register_cpu_ci, register_cuda_ci
from sglang.test.lone_kernel import compiled, run_interpreted
from sglang.test.mxfp8_utils import for_random
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=40, suite="default")
register_cuda_ci(est_time=40, suite="stage-b-test-small-1-gpu")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of temporary memory: several pieces, one.
LIMITS = (1, 4096, layout.MAX_TEMPORARY_BYTES)


def random_bytes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device=DEVICE)


class TestMXFP8Layout(CustomTestCase):
    def test_row_shuffle_is_flashinfers(self):
        from flashinfer import shuffle_matrix_a

        for n, k in ((32, 16), (128, 256), (576, 1536), (960, 33)):
            weight = random_bytes(n, k)
            expected = shuffle_matrix_a(weight, 128)
            self.assertTrue(torch.equal(layout.shuffle_rows(weight), expected), (n, k))

    @for_random(40, blocks=range(1, 10), k=[1, 4, 24, 33, 160, 576, 4096], limit=LIMITS)
    def test_shuffle_in_place_equals_shuffle_and_is_undone(self, blocks, k, limit):
        weight = random_bytes(32 * blocks, k)
        work = weight.clone()
        address = work.data_ptr()
        with mock.patch.object(layout, "MAX_TEMPORARY_BYTES", limit):
            layout.shuffle_rows_(work)
            self.assertTrue(torch.equal(work, layout.shuffle_rows(weight)))
            self.assertTrue(torch.equal(layout.unshuffle_rows(work), weight))
            layout.unshuffle_rows_(work)
        self.assertTrue(torch.equal(work, weight))
        self.assertEqual(work.data_ptr(), address)

    @for_random(60, rows=range(1, 301), groups=range(1, 21), row_tile=[8, 128])
    def test_swizzle_puts_each_byte_where_the_kernels_look(
        self, rows, groups, row_tile
    ):
        scale = random_bytes(rows, groups)
        swizzled = layout.swizzle_scale(scale, row_tile)
        self.assertEqual(
            swizzled.numel(), layout.swizzled_scale_numel(rows, groups, row_tile)
        )
        restored = layout.unswizzle_scale(swizzled, rows, groups, row_tile)
        self.assertTrue(torch.equal(restored, scale))
        self.assertEqual(int(swizzled.sum()), int(scale.sum()), "padding is not zero")
        offsets = self.offset(
            torch.arange(rows)[:, None], torch.arange(groups), groups, row_tile
        )
        self.assertTrue(torch.equal(swizzled[offsets], scale))

    @staticmethod
    def offset(row, group, groups: int, row_tile: int):
        """The byte that the kernels read for (row, group); facts from get_sf_out_offset_*."""
        tile = (row // row_tile) * -(-groups // 4) + group // 4
        if row_tile == 128:
            inside = (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4
        else:
            inside = (row % 8) * 4 + group % 4
        return tile * row_tile * 4 + inside

    @for_random(60, rows=range(1, 301), groups=range(1, 21), shuffle=(False, True))
    def test_swizzle_in_place_equals_swizzle_and_is_undone(self, rows, groups, shuffle):
        rows = layout.align(rows, 32) if shuffle else rows
        scale = random_bytes(rows, groups)
        shuffled = layout.shuffle_rows(scale) if shuffle else scale
        expected = layout.swizzle_scale(shuffled)
        swizzled = layout.swizzle_scale(scale, shuffle=shuffle)
        self.assertTrue(torch.equal(swizzled, expected))
        restored = layout.unswizzle_scale(expected, rows, groups, shuffle=shuffle)
        self.assertTrue(torch.equal(restored, scale))
        room = torch.full_like(expected, 0xA5)  # so that padding must be written
        room[: scale.numel()] = scale.view(-1)
        layout.swizzle_scale_(room, rows, groups, shuffle)
        self.assertTrue(torch.equal(room, expected))
        layout.unswizzle_scale_(room, rows, groups, shuffle)
        self.assertTrue(torch.equal(room[: scale.numel()].view_as(scale), scale))

    def test_what_does_not_fit_is_refused_before_it_is_written(self):
        weight, room = random_bytes(40, 8), random_bytes(1, 512)[0]
        before = weight.clone(), room.clone()
        with self.assertRaisesRegex(ValueError, "N % 32 == 0, got N = 40"):
            layout.shuffle_rows_(weight)
        with self.assertRaisesRegex(ValueError, "N % 32 == 0, got N = 40"):
            layout.swizzle_scale_(room, 40, 4, shuffle=True)
        with self.assertRaisesRegex(ValueError, "has 1024 bytes, got 512"):
            layout.swizzle_scale_(room, 200, 4, shuffle=False)
        self.assertTrue(torch.equal(weight, before[0]))
        self.assertTrue(torch.equal(room, before[1]))


class TestMXFP8ShuffleKernel(CustomTestCase):
    """The Triton kernel where there is no GPU: interpreted, and compiled for one."""

    def test_interpreted_kernel_shuffles_in_place_and_back(self):
        run_interpreted(
            self,
            "shuffle_kernel",
            """
            import torch

            for n, k in ((32, 16), (96, 96), (160, 160), (32, 4128)):
                buffer = torch.randint(0, 256, (n * k + 128,), dtype=torch.uint8)
                before = buffer.clone()
                weight = buffer[64:-64].view(n, k)
                original = weight.clone()
                assert kernel.can_rotate_rows(weight)
                kernel.rotate_rows_(weight, 8)
                for row in range(n):
                    to = row // 32 * 32 + row % 4 * 8 + row % 32 // 4
                    assert torch.equal(weight[to], original[row]), (n, k, row)
                kernel.rotate_rows_(weight, 4)
                assert torch.equal(buffer, before), (n, k)
            """,
        )

    def test_a_thread_reads_and_writes_only_its_own_16_bytes_of_a_row(self):
        # The kernel has no barrier, so it is right only if no value changes threads.
        for tile in (64, 128, 256):
            made = compiled(
                shuffle_kernel._rotate_rows,
                arch=100,
                warps=tile // 64,
                types={"matrix": "*i64"},
                aligned={"matrix"},
                FACTOR=8,
                TILE=tile,
            )
            ptx = made.asm["ptx"]
            self.assertNotIn("convert_layout", made.asm["ttgir"])
            self.assertEqual(made.metadata.shared, 0)
            self.assertNotIn("bar.sync", ptx)
            for access in ("ld.global", "st.global"):
                vectors = ptx.count(f"{access}.v2.b64")
                self.assertEqual((ptx.count(access), vectors), (5, 5), ptx)


@unittest.skipUnless(torch.cuda.is_available(), "needs a CUDA device")
class TestMXFP8LayoutCUDA(CustomTestCase):
    def test_shuffle_in_place_takes_no_memory(self):
        for n, k in ((32, 32), (96, 160), (1056, 576), (4096, 4096)):
            weight = random_bytes(n, k)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layout.shuffle_rows_(weight)
            self.assertEqual(torch.cuda.max_memory_allocated(), before)

    def test_an_unaligned_matrix_goes_around_the_kernel(self):
        original = random_bytes(96, 160)
        weight = torch.empty(96 * 160 + 1, dtype=torch.uint8, device=DEVICE)[1:]
        weight = weight.view(96, 160).copy_(original)
        layout.shuffle_rows_(weight)
        self.assertTrue(torch.equal(weight, layout.shuffle_rows(original)))

    def test_more_than_2_to_the_31_bytes(self):
        n, k = 32 * 16385, 4128
        if torch.cuda.mem_get_info()[0] < 3 * n * k:
            self.skipTest(f"needs {3 * n * k} bytes of device memory")
        original = random_bytes(n, k)
        weight = original.clone()
        layout.shuffle_rows_(weight)
        for start in (0, n // 64 * 32, n - 32):
            block = slice(start, start + 32)
            expected = layout.shuffle_rows(original[block])
            self.assertTrue(torch.equal(weight[block], expected), start)
        layout.unshuffle_rows_(weight)
        self.assertTrue(torch.equal(weight, original))


if __name__ == "__main__":
    unittest.main()
