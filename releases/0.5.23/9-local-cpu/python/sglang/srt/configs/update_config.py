"""
get_moe_padding_size
    why: an assertion on square blocks stopped every MXFP8 server on a CPU; MXFP8's block is [1, 32]
"""

from typing import TYPE_CHECKING

from overlay.marks import prepend

if TYPE_CHECKING:
    from sglang.srt.configs.update_config import DEFAULT_MOE_PADDING_SIZE


@prepend
def get_moe_padding_size(weight_block_size):
    if weight_block_size == [1, 32]:
        return DEFAULT_MOE_PADDING_SIZE
