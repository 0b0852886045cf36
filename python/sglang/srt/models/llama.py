"""
LlamaForCausalLM.load_weights
    why: a rename made for per-tensor FP8 drops the scales of block-quantized checkpoints
    until: upstream renames only where the parameter is called weight_scale
"""

from overlay.marks import splice


class LlamaForCausalLM:
    @splice
    def load_weights(self, name):
        if name.endswith(".weight_scale_inv"):
            weight_block_size = getattr(self.quant_config, "weight_block_size", None)
            if weight_block_size is None:
                name = name.removesuffix("_inv")
