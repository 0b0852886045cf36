"""
_llama_remap
    why: block-quantized layers call their scale weight_scale_inv; renamed, it is dropped
"""

from overlay.marks import prepend
from torch import nn

from sglang.srt.models.utils import WeightsMapper


@prepend
def _llama_remap(model: nn.Module) -> WeightsMapper:
    if getattr(model.quant_config, "weight_block_size", None) is not None:
        return WeightsMapper(orig_to_new_suffix={".activation_scale": ".input_scale"})
