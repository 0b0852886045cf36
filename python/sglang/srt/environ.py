"""
Envs.SGLANG_MXFP8_EMULATION
    why: run the FlashInfer MXFP8 backends where their kernels cannot, for tests
    until: never

Envs.SGLANG_MXFP8_ACCEPT_UNCHECKED
    why: a model that cannot be built on the meta device has no check of its weights
    until: never

Envs.SGLANG_MXFP8_SELF_CHECK
    why: a wrong kernel looks like a bad model; each server proves its own
    until: never

Envs.SGLANG_MXFP8_LINEAR_BACKEND, Envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT, Envs.SGLANG_MXFP8_CONFIG_DIR
    why: no rule is right for every shape and GPU; a user can force a choice, or measure it
    until: upstream tunes backend and layout together
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.environ import EnvBool, EnvStr


class Envs:
    # Emulate FlashInfer's MXFP8 GEMMs in torch on devices that lack them
    SGLANG_MXFP8_EMULATION = EnvBool(False)
    # Load and update weights that were not checked as a whole before
    SGLANG_MXFP8_ACCEPT_UNCHECKED = EnvBool(False)
    # Compare the kernels of MXFP8 layers with plain torch before they serve
    SGLANG_MXFP8_SELF_CHECK = EnvBool(True)
    # Backends of single layers, e.g. "down_proj=flashinfer_cutlass,layers.0.*=weight_only"
    SGLANG_MXFP8_LINEAR_BACKEND = EnvStr("")
    # Activation-scale layout of flashinfer_trtllm: auto, 8x4 or 128x4
    SGLANG_MXFP8_TRTLLM_SF_LAYOUT = EnvStr("auto")
    # Where tuned tables are, instead of layers/quantization/configs/mxfp8
    SGLANG_MXFP8_CONFIG_DIR = EnvStr("")
