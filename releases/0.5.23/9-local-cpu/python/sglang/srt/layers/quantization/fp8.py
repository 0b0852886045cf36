"""
Fp8LinearMethod.__init__
    why: the first linear of a model is made before anything asks for a backend
"""

from overlay.marks import prepend

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.base_config import LinearMethodBase


class Fp8LinearMethod(LinearMethodBase):
    @prepend
    def __init__(self):
        if envs.SGLANG_MXFP8_EMULATION.get():
            from sglang.srt.layers.quantization.mxfp8 import local_cpu

            local_cpu.install()
