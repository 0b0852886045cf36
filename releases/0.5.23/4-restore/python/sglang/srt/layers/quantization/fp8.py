"""
Fp8LinearMethod.create_weights, Fp8LinearMethod._restores_first
    why: an update may come without a session, as from IPC, and write one layer alone

Fp8LinearMethod._process_mxfp8_linear_weight_scale, Fp8LinearMethod.restore_weights_before_loading
    why: a weight that was processed twice was shuffled twice; in place, one copy of the scale does

Fp8LinearMethod._quantize_mxfp8_weights
    why: what an earlier load has quantized was quantized again
"""

from typing import Callable

import torch
from overlay.marks import prepend, splice
from torch.nn import Module
from torch.nn.parameter import Parameter

from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.mxfp8.layout import (
    align,
    shuffle_rows_,
    swizzle_scale_,
    unshuffle_rows_,
    unswizzle_scale_,
)


class Fp8LinearMethod(LinearMethodBase):
    @prepend
    def create_weights(self, layer, extra_weight_attrs):
        if self.use_mxfp8 and "weight_loader" in extra_weight_attrs:
            extra_weight_attrs["weight_loader"] = self._restores_first(
                layer, extra_weight_attrs["weight_loader"]
            )

    def _restores_first(self, layer: Module, weight_loader: Callable) -> Callable:
        """Wraps a loader: the layer that it writes is in the checkpoint's form."""

        def load(*args, **kwargs):
            self.restore_weights_before_loading(layer)
            layer.mxfp8_is_written = True
            return weight_loader(*args, **kwargs)

        return load

    @splice
    def _process_mxfp8_linear_weight_scale(self, layer, backend):
        if backend.is_flashinfer_trtllm():
            self._to_trtllm_form(layer)

    def _to_trtllm_form(self, layer: Module) -> None:
        """Permutes weight and scale for trtllm in place, once.

        The scale [N, K // 32] becomes the first rows of `weight_scale_inv_shuffled`, which
        has what trtllm's form needs more: rows in multiples of 128.
        """
        if getattr(layer, "mxfp8_is_shuffled", False):
            return
        scale = layer.weight_scale_inv
        n, groups = scale.shape
        if not hasattr(layer, "weight_scale_inv_shuffled"):
            room = scale.data.new_empty(align(n, 128), groups)
            layer.weight_scale_inv_shuffled = Parameter(room, requires_grad=False)
            room[:n] = scale.data
            scale.data = room[:n]
        room = layer.weight_scale_inv_shuffled.data
        room[:n] = scale.data  # CPU offload moves the two apart
        swizzle_scale_(room.view(-1), n, groups, shuffle=True)
        shuffle_rows_(layer.weight.data)
        layer.mxfp8_is_shuffled = True

    def restore_weights_before_loading(self, layer: Module) -> None:
        """Undoes `_to_trtllm_form`: the checkpoint's bytes, at the same addresses."""
        if getattr(layer, "mxfp8_is_shuffled", False):
            n, groups = layer.weight_scale_inv.shape
            room = layer.weight_scale_inv_shuffled.data
            unswizzle_scale_(room.view(-1), n, groups, shuffle=True)
            layer.weight_scale_inv.data.copy_(room[:n])
            unshuffle_rows_(layer.weight.data)
            layer.mxfp8_is_shuffled = False

    @prepend
    def _quantize_mxfp8_weights(self, layer):
        is_written = layer.__dict__.pop("mxfp8_is_written", False)
        if layer.weight.dtype == torch.float8_e4m3fn and not is_written:
            self._process_mxfp8_linear_weight_scale(layer)
            return
