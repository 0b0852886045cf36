"""
Envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT, Envs.SGLANG_MXFP8_CONFIG_DIR
    why: no rule is right for every shape and GPU; a user can force a choice, or measure it
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.environ import EnvStr


class Envs:
    # Activation-scale layout of MXFP8 on flashinfer_trtllm: auto, 8x4 or 128x4
    SGLANG_MXFP8_TRTLLM_SF_LAYOUT = EnvStr("auto")
    # Where tuned tables are, instead of layers/quantization/configs/mxfp8
    SGLANG_MXFP8_CONFIG_DIR = EnvStr("")
