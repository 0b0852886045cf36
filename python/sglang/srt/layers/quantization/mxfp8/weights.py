"""One MXFP8 linear's weight and scale: a single copy of each, in one of two forms.

The checkpoint form is what a checkpoint holds: e4m3 [N, K] and E8M0 bytes [N, K/32].
The kernel form is what the layer's backend reads, in the same memory: for FlashInfer a
permutation of the same bytes, undone before a weight update writes a part of them. What
the kernel form needs beyond the checkpoint's bytes (a scale's padding) lies in the
parameter's storage, beyond its view. Parameters keep their
identity, class, shape and address in both forms.
"""

import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from sglang.srt.layers.quantization.mxfp8.agreement import HalfMoved
from sglang.srt.layers.quantization.mxfp8.finite import refuse_non_finite
from sglang.srt.layers.quantization.mxfp8.headers import SCALE, WEIGHT
from sglang.srt.layers.quantization.mxfp8.layout import (
    MAX_TEMPORARY_BYTES,
    checkpoint_slabs,
    shuffle_rows_,
    swizzle_scale_,
    swizzled_scale_numel,
    unshuffle_rows_,
    unswizzle_scale_,
)
from sglang.srt.layers.quantization.mxfp8.numerics import (
    GROUP_SIZE,
    dequantize,
    quantize,
)
from sglang.srt.layers.quantization.mxfp8.routing import Mxfp8LinearChoice

# Bytes that a parameter accepts without conversion, besides its own dtype.
_SAME_BYTES = {
    torch.float8_e4m3fn: (torch.uint8,),
    torch.uint8: (torch.float8_e8m0fnu,),
}
# What a loader copies: a view of the parameter, and its source, or None for zeros.
_Copy = Tuple[torch.Tensor, Optional[torch.Tensor]]
_form_lock = threading.Lock()
_half_moved: Optional[str] = None
_deferred = ContextVar("_deferred", default=False)


class Form(Enum):
    """What a layer's bytes are now. Shapes of what is loaded are checked in the last two."""

    NEW = "being loaded for the first time"
    HELD = "as a checkpoint has them until `release`: raw bytes are being written"
    CHECKPOINT = "as a checkpoint has them"
    KERNEL = "as the backend reads them"


@contextmanager
def deferred_processing():
    """Layers that are built within it are held: whatever loads them finds that form."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def refuse_half_moved(grace: float = 0.0) -> None:
    """Raise HalfMoved for good, `grace` seconds after a layer of this process was left so."""
    if _half_moved is not None:
        time.sleep(grace)
        raise HalfMoved(_half_moved)


class Mxfp8LinearWeights:
    """The state of one linear layer's MXFP8 weight; `layer.mxfp8_weights`.

    Args:
        layer: owns `weight` (e4m3 [N, K]) and `weight_scale_inv` (uint8 [N, K/32]).
        choice: what the layer runs on; its backend fixes the kernel form.
        quantize_on_load: loaded weights are bf16/fp16/fp32 and are quantized here.

    Attributes:
        form: see `Form`.
        shapes: of what was ever loaded, by parameter name and shard id.
        loaded: the parameter names and shard ids that loads wrote.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        choice: Mxfp8LinearChoice,
        quantize_on_load: bool,
    ) -> None:
        self.layer = layer
        self.choice = choice
        self.backend = choice.backend
        self.quantize_on_load = quantize_on_load
        self.form = Form.HELD if _deferred.get() else Form.NEW
        self.name = getattr(layer, "prefix", "") or type(layer).__name__
        self.shapes: Dict[str, Dict[Any, torch.Size]] = {WEIGHT: {}, SCALE: {}}
        self.loaded: Set[Tuple[str, Any]] = set()
        self._make_room()
        self._rooms = {
            name: StorageWeakRef(getattr(layer, name).untyped_storage())
            for name in (WEIGHT, SCALE)
        }
        self._restored: Optional[torch.cuda.Event] = None

    def accept(self, param, loaded: torch.Tensor, *shard_id) -> torch.Tensor:
        """A tensor (or a shard) that is about to be written, in the parameter's dtype, or
        in 16 or 32 bits if it is quantized here.

        Raises ValueError for a dtype whose bytes are not the parameter's, for a shape
        that is not the layer's, and for a parameter that shares its memory.
        """
        name = WEIGHT if param is self.layer.weight else SCALE
        shard = shard_id[0] if shard_id else None
        self._require_rooms()
        if self.form in (Form.CHECKPOINT, Form.KERNEL):
            self._check_shape(name, shard, loaded)
        self._note(name, shard, loaded.shape)
        if not self.quantize_on_load:
            return self.as_bytes_of(param, name, loaded)
        if name == SCALE:
            raise ValueError(
                f"{self.name}.{SCALE}: --quantization mxfp8 makes the scales itself, "
                f"send {WEIGHT} only, in bf16, fp16 or fp32"
            )
        if not loaded.is_floating_point() or loaded.element_size() < 2:
            raise ValueError(
                f"{self._label(WEIGHT, loaded, *shard_id)}: --quantization mxfp8 quantizes "
                f"bf16, fp16 or fp32 weights, got {loaded.dtype}; an MXFP8 checkpoint "
                "needs no flag"
            )
        return loaded

    def write(self, loader: Callable, param, loaded: torch.Tensor, *shard_id) -> None:
        """Write what was accepted, through upstream's `loader`, in checkpoint form.

        Raises ValueError for NaN or infinity in what is quantized.
        """
        if self.quantize_on_load:
            self._write_quantized(loader, loaded, *shard_id)
        else:
            loader(param, loaded, *shard_id)

    def unwritten(self) -> List[str]:
        """Names of the parameters that no load, or not every shard, has written."""
        return [name for name in self.shapes if not self._is_whole(name)]

    def to_kernel_form(self) -> None:
        """Rearrange weight and scale for the backend, in place; unless they are held."""
        with _form_lock:
            if self.form in (Form.HELD, Form.KERNEL):
                return
            self._require_rooms()
            weight, scale = self.layer.weight.data, self.layer.weight_scale_inv.data
            with self._moving():
                if self.backend.is_flashinfer():
                    shuffled = self.backend.is_flashinfer_trtllm()
                    swizzle_scale_(kernel_scale(scale), *scale.shape, shuffled)
                    if shuffled:
                        shuffle_rows_(weight)
            self.form = Form.KERNEL

    def to_checkpoint_form(self) -> None:
        """Undo `to_kernel_form`: the checkpoint's bytes again, at the same addresses."""
        with _form_lock:
            weight, scale = self.layer.weight.data, self.layer.weight_scale_inv.data
            if self.form != Form.KERNEL:
                if self._restored is not None and weight.is_cuda:
                    # Another loader restored it, on a stream of its own.
                    stream = torch.cuda.current_stream(weight.device)
                    stream.wait_event(self._restored)
                return
            if self.backend.is_flashinfer():
                with self._moving():
                    shuffled = self.backend.is_flashinfer_trtllm()
                    unswizzle_scale_(kernel_scale(scale), *scale.shape, shuffled)
                    if shuffled:
                        unshuffle_rows_(weight)
            if weight.is_cuda:
                self._restored = torch.cuda.current_stream(weight.device).record_event()
            self.form = Form.CHECKPOINT

    def use(self, choice: Mxfp8LinearChoice) -> None:
        """Run on another backend from now on, in its form."""
        self.to_checkpoint_form()
        self.choice, self.backend = choice, choice.backend
        self.to_kernel_form()

    def hold(self) -> None:
        """Stay in checkpoint form until `release`."""
        self.to_checkpoint_form()
        self.form = Form.HELD

    def release(self) -> None:
        """Loaded: from now on, loads must have the shapes of the first."""
        if self.form != Form.KERNEL:
            self.form = Form.CHECKPOINT

    @contextmanager
    def _moving(self):
        """Bytes move within it: an exception leaves them in neither form, and from then
        on `refuse_half_moved` raises."""
        global _half_moved
        refuse_half_moved()
        try:
            yield
        except Exception as error:
            _half_moved = (
                f"{self.name} ({self.backend.value}): its weight was left half rearranged "
                f"by {error!r}. This server answers nothing any more: restart it"
            )
            raise HalfMoved(_half_moved) from error

    def dequantized(self) -> torch.Tensor:
        """The weight as bf16 [N, K], in memory of its own, from either form.

        For models that read a layer themselves (MLA's `kv_b_proj`). Changes no form.
        """
        with _form_lock:
            whole = torch.empty_like(self.layer.weight, dtype=torch.bfloat16)
            for rows, weight, scale in self.checkpoint_slabs():
                whole[rows] = dequantize(weight, scale)
            return whole

    def checkpoint_slabs(self) -> Iterator[Tuple[slice, torch.Tensor, torch.Tensor]]:
        """`layout.checkpoint_slabs` of this layer, from either form."""
        weight, scale = self.layer.weight.data, self.layer.weight_scale_inv.data
        moved = self.form == Form.KERNEL and self.backend.is_flashinfer()
        swizzled = kernel_scale(scale) if moved else None
        shuffled = moved and self.backend.is_flashinfer_trtllm()
        return checkpoint_slabs(weight, scale, swizzled, shuffled)

    def as_bytes_of(self, param, name: str, loaded: torch.Tensor) -> torch.Tensor:
        """`loaded` in the parameter's dtype, without conversion, or ValueError."""
        if loaded.dtype == param.dtype:
            return loaded
        if loaded.dtype in _SAME_BYTES[param.dtype]:
            return loaded.view(param.dtype)
        raise ValueError(
            f"{self._label(name, loaded)} holds {param.dtype}, got {loaded.dtype}; send "
            "MXFP8 (e4m3 weight and E8M0 scale), list the layer among those that the "
            "checkpoint does not quantize, or serve with --quantization mxfp8"
        )

    def check_parameters(self) -> None:
        """Raise RuntimeError where a load put other parameters in place of the layer's,
        ValueError where they were moved."""
        for name in (WEIGHT, SCALE):
            if not hasattr(getattr(self.layer, name), "weight_loader"):
                raise RuntimeError(
                    f"{self.name} ({self.backend.value}): loading replaced its {name}, "
                    "so it cannot be prepared or updated. Load formats layered and "
                    "flash_rl do so; use --load-format auto."
                )
        self._require_rooms()

    def exceeds_its_parameters(self) -> bool:
        """Whether the kernel form needs bytes beyond the registered parameters."""
        return any(
            needed > param.numel() * param.element_size()
            for param, needed in self._needed_bytes()
        )

    def _make_room(self) -> None:
        for param, needed in self._needed_bytes():
            room = torch.zeros(needed, dtype=torch.uint8, device=param.device)
            view = room[: param.numel()].view(param.dtype)
            param.data = view.view(param.shape)

    def _require_rooms(self) -> None:
        """Raise ValueError for a parameter that is not where it was made."""
        for name, room in self._rooms.items():
            param = getattr(self.layer, name)
            storage = param.untyped_storage()
            at_home = StorageWeakRef(storage) == room or self._is_offloaded(param)
            if param.storage_offset() or not at_home:
                raise ValueError(self._shares(name))

    def is_offloaded(self) -> bool:
        """Whether its bytes are not where the layer runs."""
        return self._is_offloaded(self.layer.weight)

    def _is_offloaded(self, param: torch.nn.Parameter) -> bool:
        """Whether it was moved alone, with all that its kernel form needs."""
        from sglang.srt.utils.offloader import NoopOffloader, get_offloader

        alone = param.untyped_storage().nbytes() == param.numel()
        whole = all(param.numel() >= n for p, n in self._needed_bytes() if p is param)
        return alone and whole and not isinstance(get_offloader(), NoopOffloader)

    def _shares(self, name: str) -> str:
        return (
            f"{self.name} ({self.backend.value}): its {name} was put into other memory "
            "than was made for it, or shares it, and cannot be rearranged there. Models "
            "that pack their experts into one buffer do so, as does CPU offload of a "
            "padded layer: list the layer in modules_to_not_convert, or serve in bf16, or "
            "without --cpu-offload-gb and --offload-*."
        )

    def _needed_bytes(self) -> List[Tuple[torch.nn.Parameter, int]]:
        """The parameters whose storage has more than their view, and its bytes."""
        scale = self.layer.weight_scale_inv
        if self.backend.is_flashinfer():
            return [(scale, swizzled_scale_numel(*scale.shape))]
        return []

    def _note(self, name: str, shard, shape: torch.Size) -> None:
        self.shapes[name][shard] = shape
        self.loaded.add((name, shard))

    def _is_whole(self, name: str) -> bool:
        shards = {shard for written, shard in self.loaded if written == name}
        parts = sum(len(s) if isinstance(s, tuple) else 1 for s in shards)
        return None in shards or parts == len(self.layer.logical_widths)

    def _check_shape(self, name: str, shard, loaded: torch.Tensor) -> None:
        expected = self.shapes[name].get(shard) or self._full_shape(name, shard)
        if expected is not None and loaded.shape != expected:
            raise ValueError(
                f"{self._label(name, loaded, shard)} is {list(expected)}, got "
                f"{list(loaded.shape)}{_swizzled_hint(name, loaded, expected)}"
            )

    def _label(self, name: str, loaded: torch.Tensor, shard=None) -> str:
        """The parameter, by the checkpoint's name where a check knows it."""
        part = "" if shard is None else f" (shard {shard})"
        own = f"{self.name}.{name}"
        return (", ".join(getattr(loaded, "origins", ())) or own) + part

    def _full_shape(self, name: str, shard) -> Optional[torch.Size]:
        """Shape of a whole tensor of the checkpoint, as the layer declares it."""
        layer = self.layer
        if getattr(layer, "use_presharded_weights", False) or isinstance(shard, tuple):
            return None
        if shard is None:
            rows = layer.output_size
            if hasattr(layer, "total_num_kv_heads"):  # output_size has its replicas
                rows = sum(self._full_shape(name, part)[0] for part in "qkv")
        elif hasattr(layer, "total_num_kv_heads"):
            heads = layer.total_num_heads if shard == "q" else layer.total_num_kv_heads
            rows = heads * (layer.v_head_size if shard == "v" else layer.head_size)
        else:
            rows = layer.output_sizes[shard]
        columns = layer.input_size // (GROUP_SIZE if name == SCALE else 1)
        return torch.Size((rows, columns))

    def _write_quantized(self, loader: Callable, loaded: torch.Tensor, *shard_id):
        """Quantize what `loader` would copy of `loaded`: this rank's shard, no more."""
        device = self.layer.weight.device
        copies = [
            (target, None if source is None else source.to(device))
            for target, source in _copies_of(
                loader, self.layer.weight, loaded, *shard_id
            )
            if source is None or source.numel()
        ]
        label = self._label(WEIGHT, loaded, *shard_id)
        sources = [(label, source) for _, source in copies if source is not None]
        refuse_non_finite(sources, quantizes=True)
        self._note(SCALE, *(shard_id or (None,)), _scale_shape(loaded))
        for target, source in copies:
            self._quantize_into(target, source)

    def _quantize_into(
        self, target: torch.Tensor, source: Optional[torch.Tensor]
    ) -> None:
        """Write into the weight at the place that `target` has in its stand-in."""
        whole, scales = self.layer.weight.data, self.layer.weight_scale_inv.data
        top, left = divmod(target.storage_offset(), whole.shape[1])
        weight = whole[top:, left:][: target.shape[0], : target.shape[1]]
        groups = _scale_shape(target)
        scale = scales[top:, left // GROUP_SIZE :][: groups[0], : groups[1]]
        if source is None:
            weight.zero_()
            scale.zero_()
        elif source.is_meta:  # a check, which has no numbers
            weight.copy_(torch.empty_like(source, dtype=weight.dtype))
        else:
            for rows in row_slabs(source):
                weight[rows], scale[rows] = quantize(source[rows])


def name_mxfp8_weights(model: torch.nn.Module) -> List[Mxfp8LinearWeights]:
    """The model's MXFP8 layers, each named by its path: prefixes may be missing."""
    for path, module in model.named_modules():
        if hasattr(module, "mxfp8_weights"):
            module.mxfp8_weights.name = path
    return mxfp8_weights_of(model)


def mxfp8_weights_of(model: torch.nn.Module) -> List[Mxfp8LinearWeights]:
    return [m.mxfp8_weights for m in model.modules() if hasattr(m, "mxfp8_weights")]


def check_parameters(model: torch.nn.Module) -> None:
    """Raise, naming the layer, where a model put other parameters in place of a layer's
    (RuntimeError), moved them, or keeps anything else in their memory (ValueError)."""
    owners = {}
    for weights in mxfp8_weights_of(model):
        weights.check_parameters()
        owners |= {r.cdata: (weights, n) for n, r in weights._rooms.items()}
    for module in model.modules():
        for held in (vars(module), module._parameters, module._buffers):
            for name, tensor in held.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                cdata = StorageWeakRef(tensor.untyped_storage()).cdata
                weights, own = owners.get(cdata, (None, None))
                if weights and (module, name) != (weights.layer, own):
                    raise ValueError(weights._shares(own))


def _copies_of(
    loader: Callable, param: torch.nn.Parameter, loaded: torch.Tensor, *shard_id
) -> List[_Copy]:
    """What upstream's `loader` would copy into [N, K] `param`, which is not written."""
    shape = torch.empty(param.shape, dtype=loaded.dtype, device="meta")
    stand_in = torch.Tensor._make_subclass(type(param), shape)
    vars(stand_in).update(vars(param))
    with _Copies(stand_in) as copies:
        loader(stand_in, loaded, *shard_id)
    if not copies.made:
        raise RuntimeError(f"{loader} does not copy what it loads")
    return copies.made


class _Copies(TorchFunctionMode):
    """Notes what is copied into a tensor, or zeroed there, in place of doing it."""

    def __init__(self, into: torch.Tensor) -> None:
        super().__init__()
        self._room = StorageWeakRef(into.untyped_storage())
        self.made: List[_Copy] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.copy_, torch.Tensor.zero_):
            target = args[0]
            if StorageWeakRef(target.untyped_storage()) == self._room:
                self.made.append((target, args[1] if len(args) > 1 else None))
                return target
        return function(*args, **(kwargs or {}))


def _swizzled_hint(name: str, loaded: torch.Tensor, shape: torch.Size) -> str:
    if name == SCALE and loaded.numel() == swizzled_scale_numel(*shape):
        return ": it looks swizzled, and has to be linear"
    return ""


def _scale_shape(weight: torch.Tensor) -> torch.Size:
    """Of the scale of [N, K]."""
    return torch.Size((*weight.shape[:-1], weight.shape[-1] // GROUP_SIZE))


def row_slabs(matrix: torch.Tensor) -> Iterator[slice]:
    """Rows of [N, K] in pieces whose arithmetic in fp32 stays within 64 MiB."""
    step = max(1, MAX_TEMPORARY_BYTES // (32 * max(1, matrix.shape[1])))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def kernel_scale(scale: torch.Tensor) -> torch.Tensor:
    """The 1-D 128x4 bytes behind a registered [N, K/32] scale, padding included.

    The padding lies in the parameter's storage beyond its view. Raises RuntimeError
    (from torch) when the storage is too small, as after a copy of the bare view.
    """
    return scale.as_strided((swizzled_scale_numel(*scale.shape),), (1,))


def mla_kv_b_weight(self_attn: torch.nn.Module) -> torch.Tensor:
    """The weight of `kv_b_proj`, [N, K], for models that read it themselves: of an MXFP8
    layer dequantized to bf16, in whichever form it is; of another as it is."""
    layer = self_attn.kv_b_proj
    weights = getattr(layer, "mxfp8_weights", None)
    return layer.weight if weights is None else weights.dequantized()
