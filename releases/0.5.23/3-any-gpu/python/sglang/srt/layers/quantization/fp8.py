"""
Fp8Config.get_min_capability
    why: a weight-only product runs from SM80 on

Fp8LinearMethod.__init__
    why: Marlin's FP8, chosen by itself from SM80 to SM88, does not know MXFP8's scales

Fp8MoEMethod.__init__
    why: the capability above let no MXFP8 experts pass on these GPUs, and no kernel runs them
"""

from typing import TYPE_CHECKING

from overlay.marks import append, prepend

from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
)

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.fp8 import _is_cuda, get_device_capability


class Fp8Config(QuantizationConfig):
    @prepend
    def get_min_capability(self):
        if self.use_mxfp8 and _is_cuda:
            return 80


class Fp8LinearMethod(LinearMethodBase):
    @append
    def __init__(self):
        if self.use_mxfp8 and not self.convert_mxfp8_to_block:
            self.use_marlin = False


class Fp8MoEMethod(FusedMoEMethodBase):
    @append
    def __init__(self):
        is_kept = self.use_mxfp8 and not self.convert_mxfp8_to_block
        if is_kept and _is_cuda and get_device_capability() < (10, 0):
            raise ValueError(
                "MXFP8 experts need an SM100 or later GPU; on this one only dense "
                "layers can be in MXFP8"
            )
