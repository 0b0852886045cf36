"""
LongcatFlashForCausalLMNextN.post_load_weights
    why: kv_b_proj's E8M0 scales were multiplied as integers; the layer dequantizes itself, from either form
    until: upstream reads uint8 scales here, and after restore_weights_before_loading
"""

from overlay.marks import splice

from sglang.srt.layers.quantization.mxfp8.weights import mla_kv_b_weight


class LongcatFlashForCausalLMNextN:
    @splice(within="else of if hasattr(self_attn.kv_b_proj, 'qweight')")
    def post_load_weights(self, self_attn):
        w = mla_kv_b_weight(self_attn)
