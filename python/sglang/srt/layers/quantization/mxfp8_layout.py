"""Weight and scale layouts of FlashInfer's MXFP8 GEMMs, and their inverses.

Pure torch, any device; no index tensors and no global tensors. Every function is a
permutation of bytes (plus zero padding), so each has an exact inverse.

Sources: FlashInfer 0.6.7.post3, `shuffle_matrix_a` and `shuffle_matrix_sf_a` with an
epilogue tile of 128 (row order), `block_scale_interleave` (128x4) and
`get_sf_out_offset_8x4` (8x4).
"""

import torch

GROUP_SIZE = 32  # elements along K that share one E8M0 scale
SHUFFLE_ROWS = 32  # rows that the trtllm weight layout permutes among themselves
SCALE_GROUP_TILE = 4  # scale columns per tile, in both swizzled layouts
MAX_TEMPORARY_BYTES = 64 << 20


def align(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def swizzled_scale_numel(rows: int, groups: int, row_tile: int = 128) -> int:
    """Bytes of a [rows, groups] scale in the 128x4 (or 8x4) layout, padding included."""
    return align(rows, row_tile) * align(groups, SCALE_GROUP_TILE)


def shuffle_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [N, K] in the row order of a trtllm weight; N % 32 == 0.

    Row r of each block of 32 goes to row (r % 4) * 8 + r // 4 of the block.
    """
    return _permute_blocks(weight, 8, 4)


def unshuffle_rows(weight: torch.Tensor) -> torch.Tensor:
    """Inverse of `shuffle_rows`."""
    return _permute_blocks(weight, 4, 8)


def shuffle_rows_(weight: torch.Tensor) -> torch.Tensor:
    """`shuffle_rows` in place, with at most 64 MiB of temporary memory."""
    return _permute_blocks_(weight, 8, 4)


def unshuffle_rows_(weight: torch.Tensor) -> torch.Tensor:
    """`unshuffle_rows` in place, with at most 64 MiB of temporary memory."""
    return _permute_blocks_(weight, 4, 8)


def swizzle_scale(scale: torch.Tensor, row_tile: int = 128) -> torch.Tensor:
    """Swizzle a [rows, groups] uint8 scale into the 1-D 128x4 or 8x4 layout.

    Rows are padded to `row_tile` (128 or 8) and groups to 4, with zero bytes.
    """
    rows, groups = scale.shape
    padded = scale.new_zeros(align(rows, row_tile), align(groups, SCALE_GROUP_TILE))
    padded[:rows, :groups] = scale
    column_tiles = padded.shape[1] // SCALE_GROUP_TILE
    if row_tile == 128:
        tiles = padded.view(-1, 4, 32, column_tiles, 4).permute(0, 3, 2, 1, 4)
    else:
        tiles = padded.view(-1, row_tile, column_tiles, 4).permute(0, 2, 1, 3)
    return tiles.reshape(-1)


def unswizzle_scale(
    swizzled: torch.Tensor, rows: int, groups: int, row_tile: int = 128
) -> torch.Tensor:
    """Inverse of `swizzle_scale`: [rows, groups], the padding dropped.

    Raises ValueError when the length of `swizzled` is not that of the layout.
    """
    expected = swizzled_scale_numel(rows, groups, row_tile)
    if swizzled.numel() != expected:
        raise ValueError(
            f"a [{rows}, {groups}] scale in the {row_tile}x4 layout has {expected} "
            f"bytes, got {swizzled.numel()}"
        )
    column_tiles = align(groups, SCALE_GROUP_TILE) // SCALE_GROUP_TILE
    if row_tile == 128:
        tiles = swizzled.view(-1, column_tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
    else:
        tiles = swizzled.view(-1, column_tiles, row_tile, 4).permute(0, 2, 1, 3)
    padded = tiles.reshape(align(rows, row_tile), column_tiles * SCALE_GROUP_TILE)
    return padded[:rows, :groups]


def _permute_blocks(matrix: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Within each block of outer*inner rows, exchange the two factors of the row index."""
    rows, columns = matrix.shape
    if rows % SHUFFLE_ROWS != 0:
        raise ValueError(
            f"the trtllm row order needs N % {SHUFFLE_ROWS} == 0, got N = {rows}"
        )
    blocks = matrix.view(rows // SHUFFLE_ROWS, outer, inner, columns)
    return blocks.transpose(1, 2).reshape(rows, columns)


def _permute_blocks_(matrix: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    rows, columns = matrix.shape
    wide = _widest_elements(matrix)
    block_bytes = SHUFFLE_ROWS * columns * matrix.element_size()
    step = max(1, MAX_TEMPORARY_BYTES // max(1, block_bytes)) * SHUFFLE_ROWS
    for chunk in wide.split(step):
        chunk.copy_(_permute_blocks(chunk, outer, inner))
    return matrix


def _widest_elements(matrix: torch.Tensor) -> torch.Tensor:
    """View a row-major matrix with the widest element that divides its rows.

    Moving 16 bytes at a time instead of one is worth a factor of five on a GPU.
    """
    row_bytes = matrix.shape[1] * matrix.element_size()
    for dtype in (torch.complex128, torch.int64, torch.int32):
        if row_bytes % dtype.itemsize == 0 and matrix.data_ptr() % dtype.itemsize == 0:
            return matrix.view(torch.uint8).view(dtype)
    return matrix.view(torch.uint8)
