"""The layouts of FlashInfer's MXFP8 GEMMs: FlashInfer's own helpers, and inverses."""

import unittest

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.quantization import mxfp8_layout as layout
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="default")


def random_bytes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8)


class TestMXFP8Layout(CustomTestCase):
    def test_row_shuffle_is_flashinfers(self):
        from flashinfer import shuffle_matrix_a

        for n, k in ((32, 16), (128, 256), (576, 1536), (960, 33)):
            weight = random_bytes(n, k)
            expected = shuffle_matrix_a(weight, 128)
            self.assertTrue(torch.equal(layout.shuffle_rows(weight), expected), (n, k))

    @given(
        blocks=st.integers(1, 9), k=st.sampled_from([1, 4, 24, 32, 33, 160, 576, 4096])
    )
    @settings(max_examples=40, deadline=None)
    def test_shuffle_in_place_equals_shuffle_and_is_undone(self, blocks, k):
        weight = random_bytes(32 * blocks, k)
        work, address = weight.clone(), None
        address = work.data_ptr()
        layout.shuffle_rows_(work)
        self.assertTrue(torch.equal(work, layout.shuffle_rows(weight)))
        self.assertTrue(torch.equal(layout.unshuffle_rows(work), weight))
        layout.unshuffle_rows_(work)
        self.assertTrue(torch.equal(work, weight))
        self.assertEqual(work.data_ptr(), address)

    def test_shuffle_in_place_in_several_chunks(self):
        weight = random_bytes(128, 64)
        expected = layout.shuffle_rows(weight)
        limit, layout.MAX_TEMPORARY_BYTES = layout.MAX_TEMPORARY_BYTES, 32 * 64
        try:
            layout.shuffle_rows_(weight)
        finally:
            layout.MAX_TEMPORARY_BYTES = limit
        self.assertTrue(torch.equal(weight, expected))

    def test_rows_that_cannot_be_shuffled_are_refused(self):
        with self.assertRaisesRegex(ValueError, "N % 32 == 0, got N = 40"):
            layout.shuffle_rows(random_bytes(40, 8))

    @given(
        rows=st.integers(1, 300),
        groups=st.integers(1, 20),
        row_tile=st.sampled_from([8, 128]),
    )
    @settings(max_examples=60, deadline=None)
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
        tiles = -(-groups // 4)
        for row, group in ((0, 0), (rows - 1, groups - 1), (rows // 2, groups // 2)):
            offset = self.offset(row, group, tiles, row_tile)
            self.assertEqual(swizzled[offset], scale[row, group])

    @staticmethod
    def offset(row: int, group: int, tiles: int, row_tile: int) -> int:
        """The byte that the kernels read for (row, group); facts from get_sf_out_offset_*."""
        tile = (row // row_tile) * tiles + group // 4
        if row_tile == 128:
            inside = (row % 32) * 16 + (row % 128 // 32) * 4 + group % 4
        else:
            inside = (row % 8) * 4 + group % 4
        return tile * row_tile * 4 + inside

    def test_unswizzle_refuses_a_wrong_length(self):
        with self.assertRaisesRegex(ValueError, "has 1024 bytes, got 512"):
            layout.unswizzle_scale(torch.zeros(512, dtype=torch.uint8), 200, 4)


if __name__ == "__main__":
    unittest.main()
