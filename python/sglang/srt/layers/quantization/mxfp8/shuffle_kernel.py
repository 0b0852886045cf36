"""The trtllm row shuffle of a weight, in place and in one pass: a Triton kernel.

The shuffle rotates the five bits of a row's index within its block of 32: row r goes
to 8r mod 31, and back by 4r mod 31. So rows 0 and 31 stay where they are, and the
other thirty form six cycles of five rows. A thread reads 16 bytes of each row of one
cycle before it writes any, and nobody else touches those bytes: that needs neither
temporary memory nor a barrier.
"""

import torch
import triton
import triton.language as tl

VECTOR_BYTES = 16  # what one thread moves at a time


@triton.jit
def _rotate_rows(matrix, vectors, FACTOR: tl.constexpr, TILE: tl.constexpr):
    columns = vectors * 2  # so that the compiler knows it for even: rows align to 16
    tiles = tl.cdiv(columns, TILE)
    program = tl.program_id(0)
    offsets = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = offsets < columns
    cycle = program // tiles % 6
    block = (program // tiles // 6).to(tl.int64)

    row0 = tl.where(cycle < 4, 2 * cycle + 1, 4 * cycle - 5)  # 1, 3, 5, 7, 11, 15
    row1 = row0 * FACTOR % 31
    row2 = row1 * FACTOR % 31
    row3 = row2 * FACTOR % 31
    row4 = row3 * FACTOR % 31
    start = matrix + block * 32 * columns
    at0 = start + row0 * columns + offsets
    at1 = start + row1 * columns + offsets
    at2 = start + row2 * columns + offsets
    at3 = start + row3 * columns + offsets
    at4 = start + row4 * columns + offsets

    value0 = tl.load(at0, mask=inside)
    value1 = tl.load(at1, mask=inside)
    value2 = tl.load(at2, mask=inside)
    value3 = tl.load(at3, mask=inside)
    value4 = tl.load(at4, mask=inside)
    tl.store(at1, value0, mask=inside)
    tl.store(at2, value1, mask=inside)
    tl.store(at3, value2, mask=inside)
    tl.store(at4, value3, mask=inside)
    tl.store(at0, value4, mask=inside)


def can_rotate_rows(matrix: torch.Tensor) -> bool:
    """Whether `rotate_rows_` takes this matrix: 16-byte aligned rows, contiguous."""
    row_bytes = matrix.shape[1] * matrix.element_size()
    return (
        matrix.is_contiguous()
        and row_bytes % VECTOR_BYTES == 0
        and matrix.data_ptr() % VECTOR_BYTES == 0
    )


def rotate_rows_(matrix: torch.Tensor, factor: int) -> None:
    """Move row r of each block of 32 to row `factor` * r mod 31 (31 stays), in place.

    Args:
        matrix: [N, K] of any dtype on the current device; N % 32 == 0, and
            `can_rotate_rows(matrix)`.
        factor: 8 shuffles, 4 undoes it.
    """
    words = matrix.view(torch.uint8).view(torch.int64)
    rows, columns = words.shape
    # Two words a thread: 16 bytes, and no element is held by two threads.
    tile = max(64, min(256, triton.next_power_of_2(columns)))
    programs = rows // 32 * 6 * triton.cdiv(columns, tile)
    if programs:
        _rotate_rows[(programs,)](
            words, columns // 2, factor, tile, num_warps=tile // 64
        )
