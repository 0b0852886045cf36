"""
Envs.SGLANG_MXFP8_EMULATION
    why: run the FlashInfer MXFP8 backends where their kernels cannot, for tests
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.environ import EnvBool


class Envs:
    # Emulate FlashInfer's MXFP8 GEMMs in torch on a CPU
    SGLANG_MXFP8_EMULATION = EnvBool(False)
