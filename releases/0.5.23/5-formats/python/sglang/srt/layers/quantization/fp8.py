"""
Fp8Config.override_quantization_method
    why: --quantization compressed-tensors names the format of what is MXFP8 for the loader

Fp8Config.apply_weight_name_mapper
    why: an entry of a list may be a pattern; its name is mapped, not its kind
"""

from typing import Optional

from overlay.marks import splice

from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.mxfp8.formats import map_names, names_the_format


class Fp8Config(QuantizationConfig):
    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant) -> Optional[str]:
        """The answer is "mxfp8" for an MXFP8 checkpoint, if the flag names its format."""
        return "mxfp8" if names_the_format(user_quant, hf_quant_cfg) else None

    @splice
    def apply_weight_name_mapper(self, hf_to_sglang_mapper):
        self.ignored_layers = map_names(
            self.ignored_layers, hf_to_sglang_mapper.apply_list
        )
