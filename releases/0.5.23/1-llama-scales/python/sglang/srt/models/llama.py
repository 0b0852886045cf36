"""
LlamaForCausalLM._legacy_load_weights
    why: block-quantized layers call their scale weight_scale_inv; renamed, it is dropped
"""

from overlay.marks import splice


class LlamaForCausalLM:
    @splice
    def _legacy_load_weights(self, name):
        if name.endswith(".weight_scale_inv"):
            if getattr(self.quant_config, "weight_block_size", None) is None:
                name = name.removesuffix("_inv")
