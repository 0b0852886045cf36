"""Checks a whole weight update before its first byte is written, on any rank.

A copy of the model on the meta device, which has loaders and shapes but no memory, loads
the update first. What its loaders refuse, the update is refused for; what one rank
refuses, every rank does.
"""

import json
import logging
import os
import zipfile
from contextvars import ContextVar
from typing import Any, Callable, Iterable, List, Optional, Set, Tuple

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_leaves, tree_map_only

from sglang.srt.layers.quantization.mxfp8_formats import OTHER_SCALE, SCALE
from sglang.srt.layers.quantization.mxfp8_weights import (
    WEIGHT,
    HalfMoved,
    Mxfp8LinearWeights,
    name_mxfp8_layers,
)

logger = logging.getLogger(__name__)

NamedTensors = Iterable[Tuple[str, torch.Tensor]]

_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

# DeepSeek's loaders hold one half of a fused layer until the other comes, in the same
# request; the second is fused below the first.
A_PROJ_HALVES = ("q_a_proj", "kv_a_proj_with_mqa")
FUSED_A_PROJ = "fused_qkv_a_proj_with_mqa"


class UpdateRefused(ValueError):
    """An update that the model would not take; nothing of it was written."""


class _RankUpdate:
    """This rank's part in an update that every rank of `group` writes, or none."""

    def __init__(self, group) -> None:
        self.group = group
        self.has_agreed = False
        self.may_write = False

    def agree(self, refusal: Optional[str]) -> Optional[str]:
        """The first refusal of any rank, before any of them writes. Collective."""
        self.has_agreed = True
        refusal = next(filter(None, _gather(self.group, refusal)), None)
        self.may_write = refusal is None
        return refusal


_rank_update: ContextVar[Optional[_RankUpdate]] = ContextVar(
    "_rank_update", default=None
)


def run_weight_update(group, update: Callable, *args) -> Tuple[bool, str]:
    """(success, message) of `update(*args)` on every rank of `group`.

    A failure on one rank, also an exception, is the result of all. Where `update` calls
    `agree_to_write`, none writes unless all may.
    """
    rank_update = _RankUpdate(group)
    token = _rank_update.set(rank_update)
    try:
        result = update(*args)
    except Exception as error:
        logger.exception("A weight update failed")
        message = f"Failed to update weights: {error}. {what_was_written(error)}"
        result = False, message
    finally:
        _rank_update.reset(token)
    if not rank_update.has_agreed:
        rank_update.agree(None if result[0] else result[1])
    return next((r for r in _gather(group, result) if not r[0]), result)


def agree_to_write(refusal: Optional[Exception]) -> None:
    """Before the first write of an update: raise UpdateRefused if any rank refuses it.

    Later calls in the same update, and calls outside `run_weight_update`, stand for
    this rank alone.
    """
    rank_update = _rank_update.get()
    reason = None if refusal is None else str(refusal) or repr(refusal)
    if rank_update is not None and not rank_update.has_agreed:
        reason = rank_update.agree(reason)
    if reason is not None:
        raise UpdateRefused(reason) from refusal


def what_was_written(error: Exception) -> str:
    """What a failed update left behind, for its message."""
    if isinstance(error, HalfMoved):
        return "Nothing mends that."
    rank_update = _rank_update.get()
    may_write = rank_update is not None and rank_update.may_write
    if isinstance(error, UpdateRefused) and not may_write:
        return "Nothing was written."
    return "The weights may be partially updated: update all of them again."


def _gather(group, value: Any) -> list:
    values = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


class UpdateCheck:
    """Tells whether a model would take weights, without touching the model.

    Args:
        build: makes the same model on the meta device; called at the first check.
        layers: the model's MXFP8 layers, if they are loaded: what they loaded has the
            shapes that they take.
    """

    def __init__(
        self,
        build: Callable[[], torch.nn.Module],
        layers: Optional[List[Mxfp8LinearWeights]] = None,
    ) -> None:
        self._build = build
        self._layers = layers and {weights.name: weights for weights in layers}
        self._model: Optional[torch.nn.Module] = None
        self._cannot_check = False

    def tensors(self, named_tensors: NamedTensors) -> None:
        """Check tensors in memory. Raises UpdateRefused for what cannot be loaded.

        A weight may come without its scale: trainers send their buckets one by one.
        """
        on_meta = ((name, tensor.to("meta")) for name, tensor in named_tensors)
        self._load(on_meta, whole=False)

    def files(
        self,
        files: List[str],
        use_safetensors: bool,
        name_filter: Optional[Callable[[str], bool]] = None,
    ) -> None:
        """Check a checkpoint by its files' headers. Raises UpdateRefused as `tensors` does,
        and for a file that is damaged, a weight without its scale and, of an update, a
        tensor that its index has and no file."""
        read = _read_safetensors if use_safetensors else _read_pickle
        found = [named for file in files for named in read(file)]
        if use_safetensors and self._layers is not None:
            _check_index(files, {name for name, _ in found})
        if name_filter is not None:
            found = [(name, tensor) for name, tensor in found if name_filter(name)]
        taken = self._load(found, whole=True)
        _refuse_missing_scales(found, taken)

    def _load(self, named_tensors: NamedTensors, whole: bool) -> Set[str]:
        """Load meta tensors into the meta model; the names of those that it takes.

        A `whole` checkpoint of which the model takes nothing is refused; a bucket may
        be another pipeline stage's or a draft model's.
        """
        if self._model is None and not self._cannot_check:
            self._make_model()
        if self._model is None:
            return set()
        taken: Set[str] = set()
        probes = [(name, _Probe.of(t, {name}, taken)) for name, t in named_tensors]
        try:
            self._model.load_weights(iter(probes))
        except Exception as error:
            if _is_unsupported_on_meta(error):
                logger.warning("These weights cannot be checked first: %s", error)
                return set()
            own = isinstance(error, ValueError) and str(error)
            raise UpdateRefused(own or repr(error)) from error
        untaken = [name for name, _ in probes if name not in taken]
        _refuse_lost_scales(untaken, taken)
        nothing = (
            f"the model takes nothing of {len(untaken)} tensors among these weights: "
            f"{', '.join(untaken[:8])}"
        )
        if whole:
            self._refuse_halves(untaken)
            if not taken:
                raise UpdateRefused(nothing)
        if untaken:
            logger.warning(nothing)
        return taken

    def _refuse_halves(self, untaken: List[str]) -> None:
        """A checkpoint with one half of a fused layer loses it."""
        if not any(FUSED_A_PROJ in name for name, _ in self._model.named_modules()):
            return
        for name in untaken:
            other = other_half(name)
            if other is not None and other not in untaken:
                raise UpdateRefused(f"the checkpoint has {name} without its {other}")

    def _make_model(self) -> None:
        try:
            model = self._build()
        except Exception as error:
            self._cannot_check = True
            logger.warning("Weights cannot be checked first: %s", error)
            return
        for weights in name_mxfp8_layers(model):
            weights.fixed_shapes = True
            if self._layers is None:
                continue
            if weights.name not in self._layers:
                raise UpdateRefused(
                    f"{weights.name}: the model gave this layer up after loading; "
                    "restart the server on the new weights"
                )
            loaded = self._layers[weights.name].shapes
            weights.shapes = {name: dict(s) for name, s in loaded.items()}
        # It computes with the weights, which the meta device has not.
        if hasattr(model, "post_load_weights"):
            model.post_load_weights = lambda *args, **kwargs: None
        self._model = model


class _Probe(torch.Tensor):
    """A meta tensor that remembers whose it is, and notes when a parameter takes it."""

    @classmethod
    def of(cls, tensor: torch.Tensor, names: Set[str], taken: Set[str]) -> "_Probe":
        probe = torch.Tensor._make_subclass(cls, tensor)
        probe.origins, probe.taken = names, taken
        return probe

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        probes = [p for p in tree_leaves((args, kwargs)) if isinstance(p, cls)]
        names = set().union(*(p.origins for p in probes))
        if function is torch.Tensor.item:
            probes[0].taken.update(names)
            return 0.0
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function in (torch.Tensor.copy_, torch.Tensor.__setitem__):
            refuse_as_values(", ".join(names), args[-1].dtype, args[0].dtype)
            probes[0].taken.update(names)
            return result
        return tree_map_only(
            torch.Tensor, lambda t: cls.of(t, names, probes[0].taken), result
        )


def other_half(name: str) -> Optional[str]:
    """The name of the tensor that DeepSeek's loaders fuse with the tensor `name`."""
    for half, other in (A_PROJ_HALVES, A_PROJ_HALVES[::-1]):
        if f".{half}." in name:
            return name.replace(f".{half}.", f".{other}.")
    return None


def refuse_as_values(name: str, source: torch.dtype, target: torch.dtype) -> None:
    """Raise UpdateRefused where a copy would turn quantized bytes into numbers."""
    if source.itemsize == 1 and target.is_floating_point and target.itemsize > 1:
        raise UpdateRefused(
            f"{name} is {source}, but its layer is not quantized here (embeddings, heads "
            f"and norms never are): it holds {target}"
        )


def _refuse_lost_scales(untaken: List[str], taken: Set[str]) -> None:
    for name in untaken:
        layer, _, last = name.rpartition(".")
        if last.startswith(f"{WEIGHT}_scale") and f"{layer}.{WEIGHT}" in taken:
            raise UpdateRefused(
                f"the model takes {layer}.{WEIGHT} but not {name}; the scale of an MXFP8 "
                f"layer is called {SCALE} or weight_scale"
            )


def _refuse_missing_scales(
    found: List[Tuple[str, torch.Tensor]], taken: Set[str]
) -> None:
    """An e4m3 weight that the model takes needs its scale, and a scale its weight."""
    names = {name for name, _ in found}
    for name, tensor in found:
        if name not in taken:
            continue
        layer, _, last = name.rpartition(".")
        scales = {f"{layer}.{SCALE}", f"{layer}.{OTHER_SCALE}"}
        is_mxfp8 = last == WEIGHT and tensor.dtype == torch.float8_e4m3fn
        if is_mxfp8 and not scales & names:
            raise UpdateRefused(
                f"the checkpoint lacks the scale of {name}, {name}_scale_inv"
            )
        weight = f"{layer}.{WEIGHT}"
        if name in scales and weight not in names:
            raise UpdateRefused(f"the checkpoint lacks {weight} beside {name}")


def _is_unsupported_on_meta(error: Exception) -> bool:
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error).lower()


def _read_safetensors(file: str) -> NamedTensors:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                view = tensors.get_slice(name)
                dtype = _SAFETENSORS_DTYPES[view.get_dtype()]
                yield name, torch.empty(view.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError) as error:
        raise UpdateRefused(f"{file} cannot be read: {error}") from error
    except KeyError as error:
        raise UpdateRefused(f"{file}: {name} has the unknown dtype {error}") from error


def _read_pickle(file: str) -> NamedTensors:
    try:
        mmap = zipfile.is_zipfile(file)  # torch maps no older format
        tensors = torch.load(file, map_location="meta", mmap=mmap, weights_only=True)
    except Exception as error:  # whatever a damaged zip or pickle raises
        raise UpdateRefused(f"{file} cannot be read: {error}") from error
    return [named for named in tensors.items() if isinstance(named[1], torch.Tensor)]


def _check_index(files: List[str], names: Set[str]) -> None:
    """Raises UpdateRefused when the checkpoint's index lists a tensor that no file has."""
    index = os.path.join(os.path.dirname(files[0]), "model.safetensors.index.json")
    if not os.path.exists(index):
        return
    with open(index) as file:
        missing = sorted(set(json.load(file)["weight_map"]) - names)
    if missing:
        raise UpdateRefused(
            f"{index} lists {len(missing)} tensors that no file has: {missing[0]}, ..."
        )
