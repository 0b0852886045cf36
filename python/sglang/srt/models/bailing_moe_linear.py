"""
BailingMoELinearForCausalLM.post_load_weights
    why: kv_b_proj's E8M0 scales were multiplied as integers; the layer dequantizes itself, from either form
    until: upstream reads uint8 scales here, and after restore_weights_before_loading

BailingMoELinearForCausalLM._weight_requant_ue8m0
    why: MXFP8 scales are E8M0 already; DeepGEMM's requantization takes 128x128 blocks only
    until: upstream asks for 128x128 blocks
"""

from overlay.marks import prepend, splice

from sglang.srt.layers.quantization.mxfp8.weights import mla_kv_b_weight


class BailingMoELinearForCausalLM:
    @splice(within="else of if hasattr(self_attn.kv_b_proj, 'qweight')")
    def post_load_weights(self, self_attn):
        w = mla_kv_b_weight(self_attn)

    @prepend
    def _weight_requant_ue8m0(self):
        if self.quant_config.weight_block_size == [1, 32]:
            return
