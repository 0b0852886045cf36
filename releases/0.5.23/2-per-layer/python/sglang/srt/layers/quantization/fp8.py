"""
Fp8LinearMethod.create_weights, Fp8LinearMethod._choose_mxfp8_backend
    why: the shape is known here, and each layer has a method of its own
"""

import torch
from overlay.marks import append

from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.fp8_utils import (
    mxfp8_linear_of,
    select_mxfp8_dense_gemm_backend,
)


class Fp8LinearMethod(LinearMethodBase):
    @append
    def create_weights(
        self, input_size_per_partition, output_partition_sizes, params_dtype
    ):
        n, k = sum(output_partition_sizes), input_size_per_partition
        self._choose_mxfp8_backend(n, k, params_dtype)

    def _choose_mxfp8_backend(self, n: int, k: int, dtype: torch.dtype) -> None:
        """Leaves the server's backend where its kernel does not take [N, K]."""
        # A diffusion checkpoint with markers holds its scales swizzled.
        is_swizzled = getattr(self.quant_config, "layer_markers", None) is not None
        if not self.use_mxfp8 or self.convert_mxfp8_to_block or is_swizzled:
            return
        preferred = self.mxfp8_dense_backend
        backend = select_mxfp8_dense_gemm_backend(preferred, n, k, dtype)
        if backend != preferred:
            self.mxfp8_dense_backend = backend
            self.w8a8_mxfp8_linear = mxfp8_linear_of(backend)
