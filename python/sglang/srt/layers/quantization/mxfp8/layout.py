"""Weight and scale layouts of FlashInfer's MXFP8 GEMMs, and their inverses.

Pure torch, any device (on NVIDIA GPUs the in-place row shuffle is a Triton kernel); no
index tensors and no global tensors. Every function is a permutation of bytes (plus zero
padding), so each has an exact inverse. Functions whose names end in _ work in place:
on a weight with at most 64 MiB of temporary memory, on a scale with two of its size.

Sources: FlashInfer 0.6.7.post3, `shuffle_matrix_a` and `shuffle_matrix_sf_a` with an
epilogue tile of 128 (row order), `block_scale_interleave` (128x4) and
`get_sf_out_offset_8x4` (8x4).
"""

from typing import Iterator, Optional, Tuple

import torch

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
    """`shuffle_rows` in place; on an NVIDIA GPU without temporary memory."""
    return _permute_blocks_(weight, 8, 4)


def unshuffle_rows_(weight: torch.Tensor) -> torch.Tensor:
    """`unshuffle_rows` in place; on an NVIDIA GPU without temporary memory."""
    return _permute_blocks_(weight, 4, 8)


def swizzle_scale(
    scale: torch.Tensor, row_tile: int = 128, shuffle: bool = False
) -> torch.Tensor:
    """Swizzle a [rows, groups] uint8 scale into the 1-D 128x4 or 8x4 layout.

    Rows are padded to `row_tile` (128 or 8) and groups to 4, with zero bytes. With
    `shuffle` (128x4, rows % 32 == 0), the rows go through `shuffle_rows` first: the
    scale of a trtllm weight.
    """
    if shuffle:
        _check_rows(scale.shape[0])
    plain = _plain_view(_pad(scale, row_tile), row_tile, shuffle)
    return plain.permute(_REVERSE).contiguous().view(-1).view(scale.dtype)


def unswizzle_scale(
    swizzled: torch.Tensor,
    rows: int,
    groups: int,
    row_tile: int = 128,
    shuffle: bool = False,
) -> torch.Tensor:
    """Inverse of `swizzle_scale`: [rows, groups], the padding dropped.

    Raises ValueError when the length of `swizzled` is not that of the layout.
    """
    _check_scale(swizzled, rows, groups, row_tile, shuffle)
    tiles = _tile_view(swizzled, groups, row_tile, shuffle)
    padded = tiles.permute(_REVERSE).contiguous().view(-1).view(swizzled.dtype)
    return padded.view(-1, align(groups, SCALE_GROUP_TILE))[:rows, :groups]


def swizzle_scale_(room: torch.Tensor, rows: int, groups: int, shuffle: bool) -> None:
    """`swizzle_scale` into the 128x4 layout, in place.

    `room` is 1-D uint8 of `swizzled_scale_numel(rows, groups)` bytes, which start with
    the [rows, groups] scale. Raises ValueError, before the first write, for a room of
    another length, or for rows % 32 != 0 with `shuffle`.
    """
    _check_scale(room, rows, groups, 128, shuffle)
    plain = room[: rows * groups].view(rows, groups)
    copy = _plain_view(_pad(plain, 128), 128, shuffle)
    _tile_view(room, groups, 128, shuffle).copy_(copy.permute(_REVERSE))


def unswizzle_scale_(room: torch.Tensor, rows: int, groups: int, shuffle: bool) -> None:
    """Inverse of `swizzle_scale_`; what follows the scale in `room` is left undefined."""
    plain = unswizzle_scale(room, rows, groups, 128, shuffle)
    room[: rows * groups].view(rows, groups).copy_(plain)


def checkpoint_slabs(
    weight: torch.Tensor,
    scale: torch.Tensor,
    swizzled: Optional[torch.Tensor],
    shuffled: bool,
) -> Iterator[Tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows, and the weight and scale that a checkpoint has for them.

    Of so many rows that they and their absolute values in fp64 take about 64 MiB.

    Args:
        weight, scale: [N, K] and [N, K // 32] of a layer.
        swizzled: the scale in the 128x4 layout, if it is to be read from that.
        shuffled: the rows of the weight and of `swizzled` are a trtllm weight's.
    """
    (n, k), groups = weight.shape, scale.shape[1]
    step = max(1, MAX_TEMPORARY_BYTES // (16 * 128 * k)) * 128
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        part, part_scale = weight[rows], scale[rows]
        if swizzled is not None:
            size = swizzled_scale_numel(len(part), groups)
            tiles = swizzled[swizzled_scale_numel(start, groups) :][:size]
            part_scale = unswizzle_scale(tiles, len(part), groups, shuffle=shuffled)
        if shuffled:
            part = unshuffle_rows(part)
        yield rows, part, part_scale


# Seen as 4-byte words, with the row index in three factors, a swizzled scale is the plain
# one with all dimensions but the first (whole row tiles) in reverse order.
_REVERSE = (0, 4, 3, 2, 1)


def _row_factors(row_tile: int, shuffle: bool) -> Tuple[int, int, int]:
    if shuffle:
        return 4, 8, 4
    return (4, 32, 1) if row_tile == 128 else (1, row_tile, 1)


def _plain_view(padded: torch.Tensor, row_tile: int, shuffle: bool) -> torch.Tensor:
    words = padded.view(torch.int32)
    return words.view(-1, *_row_factors(row_tile, shuffle), words.shape[1])


def _tile_view(
    swizzled: torch.Tensor, groups: int, row_tile: int, shuffle: bool
) -> torch.Tensor:
    column_tiles = align(groups, SCALE_GROUP_TILE) // SCALE_GROUP_TILE
    factors = reversed(_row_factors(row_tile, shuffle))
    return swizzled.view(torch.int32).view(-1, column_tiles, *factors)


def _pad(scale: torch.Tensor, row_tile: int) -> torch.Tensor:
    """A copy of `scale` with whole tiles, the padding zero."""
    rows, groups = scale.shape
    if rows == 0:  # torch pads no empty tensor
        return scale.new_empty(0, align(groups, SCALE_GROUP_TILE))
    padding = (0, -groups % SCALE_GROUP_TILE, 0, -rows % row_tile)
    return torch.nn.functional.pad(scale.contiguous(), padding)


def _check_scale(
    swizzled: torch.Tensor, rows: int, groups: int, row_tile: int, shuffle: bool
) -> None:
    if shuffle:
        _check_rows(rows)
    expected = swizzled_scale_numel(rows, groups, row_tile)
    if swizzled.numel() != expected:
        raise ValueError(
            f"a [{rows}, {groups}] scale in the {row_tile}x4 layout has {expected} "
            f"bytes, got {swizzled.numel()}"
        )


def _check_rows(rows: int) -> None:
    if rows % SHUFFLE_ROWS != 0:
        raise ValueError(
            f"the trtllm row order needs N % {SHUFFLE_ROWS} == 0, got N = {rows}"
        )


def _permute_blocks(matrix: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Within each block of outer*inner rows, exchange the two factors of the row index."""
    rows, columns = matrix.shape
    _check_rows(rows)
    blocks = matrix.view(rows // SHUFFLE_ROWS, outer, inner, columns)
    return blocks.transpose(1, 2).reshape(rows, columns)


def _permute_blocks_(matrix: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    rows, columns = matrix.shape
    _check_rows(rows)
    if matrix.is_cuda and torch.version.hip is None:
        from sglang.srt.layers.quantization.mxfp8 import shuffle_kernel as kernel

        if kernel.can_rotate_rows(matrix):
            with torch.cuda.device(matrix.device):
                kernel.rotate_rows_(matrix, outer)
            return matrix
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
