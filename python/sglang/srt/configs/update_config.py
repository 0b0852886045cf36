"""
get_moe_padding_size
    why: MXFP8's weight block is [1, 32]; only square blocks were accepted, and a server on a CPU asks always
    until: upstream accepts MXFP8 blocks here
"""

from typing import TYPE_CHECKING

from overlay.marks import prepend

if TYPE_CHECKING:
    from sglang.srt.configs.update_config import DEFAULT_MOE_PADDING_SIZE


@prepend
def get_moe_padding_size(weight_block_size):
    if weight_block_size == [1, 32]:
        return DEFAULT_MOE_PADDING_SIZE
