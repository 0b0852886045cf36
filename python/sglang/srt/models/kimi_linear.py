"""
KimiLinearForCausalLM.load_weights
    why: an MXFP8 weight without its scales is not the weight, and a reload may find it in kernel form
    until: upstream dequantizes block-scaled weights here
"""

from overlay.marks import splice


class KimiLinearForCausalLM:
    @splice
    def load_weights(self, self_attn):
        w_kc, w_vc = (
            (
                self_attn.kv_b_proj.mxfp8_weights.dequantized()
                if hasattr(self_attn.kv_b_proj, "mxfp8_weights")
                else self_attn.kv_b_proj.weight
            )
            .unflatten(0, (-1, self_attn.qk_nope_head_dim + self_attn.v_head_dim))
            .split([self_attn.qk_nope_head_dim, self_attn.v_head_dim], dim=1)
        )
