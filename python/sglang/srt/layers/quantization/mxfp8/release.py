"""What the update check needs of this release's MXFP8 models.

Each release has its own file of these names; nothing else in the check differs.
"""

from sglang.srt.layers.quantization.mxfp8.names import (
    IS_SCALE,
    OTHER_SCALE,
    refuse_bad_kv_scales,
    with_mxfp8_names,
)
from sglang.srt.layers.quantization.mxfp8.weights import (
    SCALE,
    WEIGHT,
    name_mxfp8_weights,
)

# Experts are rearranged at load, and again only after a whole update from disk.
ANY_EXPERT_UPDATE = False

__all__ = [
    "ANY_EXPERT_UPDATE",
    "IS_SCALE",
    "OTHER_SCALE",
    "SCALE",
    "WEIGHT",
    "name_mxfp8_weights",
    "refuse_bad_kv_scales",
    "with_mxfp8_names",
]
