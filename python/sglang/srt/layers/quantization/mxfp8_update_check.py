"""Checks a whole weight update before its first byte is written.

A copy of the model on the meta device, which has loaders and shapes but no memory, loads
the update first. What its loaders refuse, the update is refused for.
"""

import json
import logging
import os
import zipfile
from typing import Callable, Iterable, List, Optional, Set, Tuple

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_leaves, tree_map_only

from sglang.srt.layers.quantization.mxfp8_weights import (
    SCALE,
    WEIGHT,
    Mxfp8LinearWeights,
    mxfp8_layers,
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

_FUSED_A_PROJ = ("q_a_proj", "kv_a_proj_with_mqa")


class UpdateRefused(ValueError):
    """An update that the model would not take; nothing of it was written."""


class UpdateCheck:
    """Tells whether a model would take an update, without touching the model.

    Args:
        layers: the model's MXFP8 layers, loaded.
        build: makes the same model on the meta device; called at the first check.
    """

    def __init__(
        self, layers: List[Mxfp8LinearWeights], build: Callable[[], torch.nn.Module]
    ) -> None:
        self._layers = {weights.name: weights for weights in layers}
        self._build = build
        self._model: Optional[torch.nn.Module] = None

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
        and for a file that is damaged or missing, and a weight without its scale."""
        read = _read_safetensors if use_safetensors else _read_pickle
        found = [named for file in files for named in read(file)]
        if use_safetensors:
            _check_index(files, {name for name, _ in found})
        if name_filter is not None:
            found = [(name, tensor) for name, tensor in found if name_filter(name)]
        written = self._load(found, whole=True)
        for weights in written:
            shards = {SCALE: set(), WEIGHT: set()}
            for name, shard in weights.loaded:
                shards[name].add(shard)
            if shards[SCALE] != shards[WEIGHT]:
                lacks = SCALE if shards[WEIGHT] - shards[SCALE] else WEIGHT
                raise UpdateRefused(
                    f"{weights.name}: the checkpoint lacks a {lacks} beside its "
                    f"{WEIGHT if lacks == SCALE else SCALE}"
                )

    def _load(
        self, named_tensors: NamedTensors, whole: bool
    ) -> List[Mxfp8LinearWeights]:
        """Load meta tensors into the meta model; its layers that were written.

        A `whole` checkpoint of which the model takes nothing is refused; a bucket may
        be another pipeline stage's or a draft model's.
        """
        if self._model is None and not self._make_model():
            return []
        layers = mxfp8_layers(self._model)
        for weights in layers:
            weights.loaded.clear()
        taken: Set[str] = set()
        probes = [(name, _Probe.of(t, {name}, taken)) for name, t in named_tensors]
        try:
            self._model.load_weights(iter(probes))
        except Exception as error:
            if _is_unsupported_on_meta(error):
                logger.warning("This weight update cannot be checked first: %s", error)
                return []
            raise UpdateRefused(str(error) or repr(error)) from error
        untaken = [name for name, _ in probes if name not in taken]
        self._refuse_halves(untaken)
        if untaken:
            message = (
                f"the model takes nothing of {len(untaken)} tensors in this weight "
                f"update: {', '.join(untaken[:8])}"
            )
            if whole and not taken:
                raise UpdateRefused(message)
            logger.warning(message)
        return [weights for weights in layers if weights.loaded]

    def _refuse_halves(self, untaken: List[str]) -> None:
        """DeepSeek's loaders wait for the other half of a fused layer until the request
        ends, and then forget the half that came."""
        modules = dict(self._model.named_modules())
        for name in untaken:
            for half, other in (_FUSED_A_PROJ, _FUSED_A_PROJ[::-1]):
                layer = name.rpartition(".")[0]
                fused = layer.removesuffix(half) + "fused_qkv_a_proj_with_mqa"
                if layer.endswith(f".{half}") and fused in modules:
                    raise UpdateRefused(
                        f"{name} came without its {other}: they are halves of {fused}, "
                        "send both in one request"
                    )

    def _make_model(self) -> bool:
        try:
            model = self._build()
        except Exception as error:
            logger.warning("Weight updates cannot be checked first: %s", error)
            return False
        for weights in name_mxfp8_layers(model):
            if weights.name not in self._layers:
                raise UpdateRefused(
                    f"{weights.name}: the model gave this layer up after loading; "
                    "restart the server on the new weights"
                )
            loaded = self._layers[weights.name].shapes
            weights.shapes = {name: dict(s) for name, s in loaded.items()}
            weights.fixed_shapes = True
        # It computes with the weights, which the meta device has not.
        if hasattr(model, "post_load_weights"):
            model.post_load_weights = lambda *args, **kwargs: None
        self._model = model
        return True


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
            probes[0].taken.update(names)
            return result
        return tree_map_only(
            torch.Tensor, lambda t: cls.of(t, names, probes[0].taken), result
        )


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
    return tensors.items()


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
