"""
Envs.SGLANG_MXFP8_ACCEPT_UNCHECKED
    why: a way out for models that cannot be built on the meta device
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.environ import EnvBool


class Envs:
    # Load MXFP8 weights without checking first that they fill the model
    SGLANG_MXFP8_ACCEPT_UNCHECKED = EnvBool(False)
