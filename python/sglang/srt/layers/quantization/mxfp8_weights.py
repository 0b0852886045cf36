"""One MXFP8 linear's weight and scale: a single copy of each, in one of two forms.

The checkpoint form is what a checkpoint holds: e4m3 [N, K] and E8M0 bytes [N, K/32].
The kernel form is what the layer's backend reads. For the FlashInfer backends it is a
permutation of the same bytes in the same memory, so that it can be undone before the
next weight update writes a part of them. Parameters keep their identity, class, shape
and address in both forms.
"""

import logging
import threading
from typing import Callable, Dict, List, Set

import torch

from sglang.srt.layers.quantization.fp8_utils import Mxfp8LinearBackend
from sglang.srt.layers.quantization.mxfp8_emulation import dequantize, quantize
from sglang.srt.layers.quantization.mxfp8_layout import (
    shuffle_rows,
    shuffle_rows_,
    swizzle_scale,
    swizzled_scale_numel,
    unshuffle_rows,
    unshuffle_rows_,
    unswizzle_scale,
)
from sglang.srt.layers.utils import copy_or_rebind_param
from sglang.srt.utils import log_info_on_rank0

logger = logging.getLogger(__name__)

WEIGHT, SCALE = "weight", "weight_scale_inv"
# Bytes that a parameter accepts without conversion, besides its own dtype.
_SAME_BYTES = {
    torch.float8_e4m3fn: (torch.uint8,),
    torch.uint8: (torch.float8_e8m0fnu,),
}
_form_lock = threading.Lock()


def kernel_scale(scale: torch.Tensor) -> torch.Tensor:
    """The 1-D 128x4 bytes behind a registered [N, K/32] scale, padding included.

    The padding lies in the parameter's storage beyond its view. Raises RuntimeError
    (from torch) when the storage is too small, as after a copy of the bare view.
    """
    return scale.as_strided((swizzled_scale_numel(*scale.shape),), (1,))


class Mxfp8LinearWeights:
    """The state of one linear layer's MXFP8 weight; `layer.mxfp8_weights`.

    Args:
        layer: owns `weight` (e4m3 [N, K]) and `weight_scale_inv` (uint8 [N, K/32]).
        backend: what the layer runs on; fixes the kernel form.
        reason: why it does not run on the backend that was asked for, or "".
        quantize_on_load: loaded weights are bf16/fp16/fp32 and are quantized here.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        backend: Mxfp8LinearBackend,
        reason: str,
        quantize_on_load: bool,
    ) -> None:
        self.layer = layer
        self.backend = backend
        self.reason = reason
        self.quantize_on_load = quantize_on_load
        self.in_kernel_form = False
        self.written: Dict[str, Set] = {WEIGHT: set(), SCALE: set()}
        if backend.is_flashinfer():
            self._make_room_for_padding()

    @property
    def name(self) -> str:
        return getattr(self.layer, "prefix", "") or type(self.layer).__name__

    @property
    def operand(self) -> torch.nn.Parameter:
        """The weight that the backend multiplies with."""
        if self.backend.is_bf16():
            return self.layer.dequantized_weight
        return self.layer.weight

    def load(self, loader: Callable, param, loaded: torch.Tensor, *shard_id) -> None:
        """Write one loaded tensor (or a shard of it) through upstream's `loader`.

        Brings the layer to checkpoint form first. Raises ValueError for a dtype whose
        bytes are not the parameter's.
        """
        self.to_checkpoint_form()
        if param is self.layer.weight and self.quantize_on_load:
            values, scale = self._quantize(loaded.to(param.device))
            loader(self.layer.weight, values, *shard_id)
            loader(self.layer.weight_scale_inv, scale, *shard_id)
            self._mark_written((WEIGHT, SCALE), shard_id)
            return
        name = WEIGHT if param is self.layer.weight else SCALE
        loader(param, self._as_bytes_of(param, name, loaded), *shard_id)
        self._mark_written((name,), shard_id)

    def unwritten(self) -> List[str]:
        """Names of the parameters that no load, or not every shard, has written."""
        shards = len(self.layer.logical_widths)
        return [
            name
            for name, ids in self.written.items()
            if None not in ids and len(ids) < shards
        ]

    def to_kernel_form(self) -> None:
        """Rearrange weight and scale for the backend, in place; once is enough."""
        with _form_lock:
            if self.in_kernel_form:
                return
            weight, scale = self.layer.weight.data, self.layer.weight_scale_inv.data
            if self.backend.is_flashinfer():
                shuffled = self.backend.is_flashinfer_trtllm()
                swizzled = swizzle_scale(shuffle_rows(scale) if shuffled else scale)
                if shuffled:
                    shuffle_rows_(weight)
                kernel_scale(scale).copy_(swizzled)
            elif self.backend.is_bf16():
                copy_or_rebind_param(
                    self.layer,
                    "dequantized_weight",
                    dequantize(weight, scale).to(torch.bfloat16),
                )
            self.in_kernel_form = True

    def to_checkpoint_form(self) -> None:
        """Undo `to_kernel_form`: the checkpoint's bytes again, at the same addresses."""
        with _form_lock:
            if not self.in_kernel_form:
                return
            weight, scale = self.layer.weight.data, self.layer.weight_scale_inv.data
            if self.backend.is_flashinfer():
                restored = unswizzle_scale(kernel_scale(scale), *scale.shape)
                if self.backend.is_flashinfer_trtllm():
                    restored = unshuffle_rows(restored.contiguous())
                    unshuffle_rows_(weight)
                scale.copy_(restored.clone())
            self.in_kernel_form = False

    def _make_room_for_padding(self) -> None:
        scale = self.layer.weight_scale_inv
        room = scale.new_zeros(swizzled_scale_numel(*scale.shape))
        scale.data = room[: scale.numel()].view_as(scale)

    def _quantize(self, loaded: torch.Tensor) -> tuple:
        if not loaded.is_floating_point() or loaded.element_size() < 2:
            raise ValueError(
                f"{self.name}.{WEIGHT}: --quantization mxfp8 quantizes bf16, fp16 or "
                f"fp32 weights, got {loaded.dtype}; an MXFP8 checkpoint needs no flag"
            )
        return quantize(loaded)

    def _as_bytes_of(self, param, name: str, loaded: torch.Tensor) -> torch.Tensor:
        if loaded.dtype == param.dtype:
            return loaded
        if loaded.dtype in _SAME_BYTES[param.dtype]:
            return loaded.view(param.dtype)
        raise ValueError(
            f"{self.name}.{name} holds {param.dtype}, got {loaded.dtype}; send MXFP8 "
            "(e4m3 weight and E8M0 scale), or serve with --quantization mxfp8"
        )

    def _mark_written(self, names, shard_id: tuple) -> None:
        ids = shard_id[0] if shard_id else None
        for name in names:
            self.written[name].update(ids if isinstance(ids, tuple) else (ids,))


def manage_mxfp8_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Keep a loaded model's MXFP8 layers in kernel form across every later load.

    Returns `model`, whose `load_weights` now ends by bringing the layers that it wrote
    back to kernel form. Logs once which backend each group of layers runs on.

    Raises ValueError naming the layers that a checkpoint load did not fill. Loads that
    write past the loaders (dummy, sharded state) write no layer, and are left alone.
    """
    layers = [m.mxfp8_weights for m in model.modules() if hasattr(m, "mxfp8_weights")]
    if not layers:
        return model
    _check_all_written(layers)
    _log_backends(layers)
    load_weights = model.load_weights

    def load_weights_and_process(*args, **kwargs):
        try:
            return load_weights(*args, **kwargs)
        finally:
            for weights in layers:
                weights.to_kernel_form()

    model.load_weights = load_weights_and_process
    return model


def _check_all_written(layers: List[Mxfp8LinearWeights]) -> None:
    if not any(ids for weights in layers for ids in weights.written.values()):
        return
    missing = [f"{w.name}.{name}" for w in layers for name in w.unwritten()]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(
            f"the checkpoint did not fill {len(missing)} MXFP8 tensors: {shown}. "
            "Check that it has a weight_scale_inv beside every quantized weight, and "
            "that layers kept in bf16 are listed in modules_to_not_convert."
        )


def _log_backends(layers: List[Mxfp8LinearWeights]) -> None:
    groups: Dict[tuple, List[Mxfp8LinearWeights]] = {}
    for weights in layers:
        groups.setdefault((weights.backend, weights.reason), []).append(weights)
    for (backend, reason), members in groups.items():
        kinds = {w.name.split(".")[-1]: tuple(w.layer.weight.shape) for w in members}
        listed = ", ".join(f"{kind} {list(shape)}" for kind, shape in kinds.items())
        log_info_on_rank0(
            logger,
            f"MXFP8: {len(members)} linear layers on {backend.value} ({listed})"
            + (f": {reason}" if reason else ""),
        )
