"""
Fp8LinearMethod._choose_mxfp8_backend
    why: the shape says which layout of the activation scales is the faster one on trtllm
"""

from overlay.marks import append

from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.fp8_utils import trtllm_mxfp8_linear_of


class Fp8LinearMethod(LinearMethodBase):
    @append
    def _choose_mxfp8_backend(self, n, k, backend):
        if backend.is_flashinfer_trtllm():
            self.w8a8_mxfp8_linear = trtllm_mxfp8_linear_of(n, k)
