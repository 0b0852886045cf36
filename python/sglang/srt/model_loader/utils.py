"""
should_deepgemm_weight_requant_ue8m0
    why: MXFP8 scales are E8M0 already; MLA models would unpack or requantize them for DeepGEMM
    until: upstream asks for 128x128 blocks
"""

from overlay.marks import prepend


@prepend
def should_deepgemm_weight_requant_ue8m0(weight_block_size):
    if weight_block_size == [1, 32]:
        return False
