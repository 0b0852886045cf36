"""
KimiLinearForCausalLM.load_weights
    why: an MXFP8 weight without its scales is not the weight, and a reload may find it in kernel form
    until: upstream dequantizes block-scaled weights here
"""

from overlay.marks import splice

from sglang.srt.layers.quantization.mxfp8.weights import mla_kv_b_weight


class KimiLinearForCausalLM:
    @splice
    def load_weights(self, self_attn):
        w_kc, w_vc = (
            mla_kv_b_weight(self_attn)
            .unflatten(0, (-1, self_attn.qk_nope_head_dim + self_attn.v_head_dim))
            .split([self_attn.qk_nope_head_dim, self_attn.v_head_dim], dim=1)
        )
