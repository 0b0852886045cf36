"""
Envs.SGLANG_MXFP8_SELF_CHECK
    why: a wrong kernel looks like a bad model; each server proves its own
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.environ import EnvBool


class Envs:
    # Compare the kernels of MXFP8 linears with plain torch before they serve
    SGLANG_MXFP8_SELF_CHECK = EnvBool(True)
