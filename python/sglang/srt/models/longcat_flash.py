"""
LongcatFlashForCausalLM.post_load_weights
    why: kv_b_proj's E8M0 scales were multiplied as integers; the layer dequantizes itself, from either form
    until: upstream reads uint8 scales here, and after restore_weights_before_loading
"""

from typing import TYPE_CHECKING

from overlay.marks import splice

if TYPE_CHECKING:
    from sglang.srt.models.longcat_flash import block_quant_to_tensor_quant


class LongcatFlashForCausalLM:
    @splice(
        within=(
            "if hasattr(self.quant_config, 'weight_block_size')"
            " and self.quant_config.weight_block_size is not None",
        )
    )
    def post_load_weights(self, self_attn, weight, weight_scale, weight_block_size):
        w, scale = (
            (self_attn.kv_b_proj.mxfp8_weights.dequantized(), 1.0)
            if hasattr(self_attn.kv_b_proj, "mxfp8_weights")
            else block_quant_to_tensor_quant(weight, weight_scale, weight_block_size)
        )
