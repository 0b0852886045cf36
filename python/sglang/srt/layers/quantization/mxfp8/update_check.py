"""Checks a whole checkpoint or update before its first byte is written.

A copy of the model on the meta device, which has loaders and shapes but no memory, loads
it first. What its loaders refuse is refused; a checkpoint has to fill every parameter.
"""

import hashlib
import os
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.mxfp8.agreement import (
    CannotCheck,
    UpdateRefused,
    note_taken,
    shorten,
)
from sglang.srt.layers.quantization.mxfp8.finite import refuse_non_finite
from sglang.srt.layers.quantization.mxfp8.headers import (
    OTHER_SCALE,
    SCALE,
    WEIGHT,
    check_index,
    read_headers,
    read_index,
    with_mxfp8_names,
)
from sglang.srt.layers.quantization.mxfp8.meta import (
    MetaLoad,
    Parameter,
    Probe,
    parameters_of,
)
from sglang.srt.layers.quantization.mxfp8.release import (
    ANY_EXPERT_UPDATE,
    IS_SCALE,
    name_mxfp8_weights,
    prepare_weights,
    refuse_bad_kv_scales,
)
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

NamedTensors = Iterable[Tuple[str, torch.Tensor]]


ACCEPT_UNCHECKED = (
    "SGLANG_MXFP8_ACCEPT_UNCHECKED=1 loads weights without this check, at your risk"
)
MAX_PASSED = 64  # sets of tensors that are known to pass


class UpdateCheck:
    """Tells whether a model would take weights, without touching the model.

    Args:
        build: makes the same model on the meta device; called once, here.
        model_config: of the model.
        is_stage: the model is a stage of a pipeline.

    Raises CannotCheck if the model cannot be built there.
    """

    def __init__(
        self, build: Callable[[], torch.nn.Module], model_config, is_stage: bool
    ) -> None:
        # Such a model may take none of an update.
        self._is_part = model_config.is_draft_model or is_stage
        self._not_needed = _not_needed(model_config)
        self._passed: Dict[bytes, Tuple[Set[str], List[str]]] = {}
        self._expected: Set[str] = set()
        self._shapes: Dict[str, torch.Size] = {}  # of the checkpoint at start
        try:
            self._model = build()
        except Exception as error:
            raise CannotCheck(
                "MXFP8 weights cannot be checked before they are loaded, since the model "
                f"cannot be built on the meta device: {error!r}. {ACCEPT_UNCHECKED}"
            ) from error
        self._layers = name_mxfp8_weights(self._model)
        for weights in self._layers:
            weights.release()
        self._quantizes = any(weights.quantize_on_load for weights in self._layers)
        self._parameters = parameters_of(self._model)

    def follow(self, model: torch.nn.Module) -> None:
        """From now on, checks are of updates of `model`, which is loaded."""
        own = {f"{w.name}.{name}" for w in self._layers for name in (WEIGHT, SCALE)}
        self._expected = own | (_names(self._model) & _names(model))

    def tensors(self, model: torch.nn.Module, named_tensors: NamedTensors) -> None:
        """Check tensors in memory. Raises UpdateRefused for what `model` cannot load.

        A weight may come without its scale: trainers send their buckets one by one.
        """
        named_tensors = list(named_tensors)
        self._refuse_another(model)
        taken, untaken = self._load(named_tensors, whole=False)
        if not note_taken(taken, () if self._is_part else untaken):
            self._refuse_nothing(untaken)
        named_tensors = [named for named in named_tensors if named[0] in taken]
        refuse_bad_kv_scales(model, named_tensors)
        refuse_non_finite(named_tensors, self._quantizes)

    def files(
        self,
        files: List[str],
        use_safetensors: bool,
        model: Optional[torch.nn.Module] = None,
        rename: Callable[[NamedTensors], NamedTensors] = iter,
        name_filter: Optional[Callable[[str], bool]] = None,
    ) -> Set[str]:
        """Check a checkpoint by its files' headers: the names that the model takes.

        Raises UpdateRefused as `tensors` does, for a damaged file, for a tensor that stands
        in two files or that the index has and no file, and for a parameter that nothing
        fills.

        Args:
            model: what is updated; None at start.
            rename: the tensors as a loader gives them to the model.
            name_filter: the update is of these tensors only.
        """
        if model is not None:
            self._refuse_another(model)
        named_tensors = read_headers(files, use_safetensors)
        if use_safetensors:
            check_index(os.path.dirname(files[0]))
        named_tensors = list(rename(named_tensors))
        if name_filter is not None:
            named_tensors = [named for named in named_tensors if name_filter(named[0])]
        taken, untaken = self._load(named_tensors, whole=name_filter is None)
        if not taken:
            self._refuse_nothing(untaken)
        if model is None:
            self._shapes = {name: torch.Size(t.shape) for name, t in named_tensors}
        return taken

    def source(
        self,
        loader,
        source,
        model: Optional[torch.nn.Module] = None,
        name_filter: Optional[Callable[[str], bool]] = None,
    ) -> Set[str]:
        """Check, as `files` does, what a default loader reads from its `source`."""
        from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors

        path, draft = source.model_or_path, loader.load_config.draft_model_idx
        if os.path.isdir(path):
            read_index(path)
        elif model is not None and path.count("/") != 1:  # a hub's are "owner/name"
            raise UpdateRefused("there is no such folder")
        try:
            folder, files, use_safetensors = prepare_weights(loader, source)
        except Exception as error:
            if model is None or os.path.isdir(path):
                raise
            raise UpdateRefused(
                f"there is no such folder here, nor such a model on a hub ({error})"
            ) from error
        if use_safetensors:
            files = maybe_add_mtp_safetensors(
                files, folder, SAFE_WEIGHTS_INDEX_NAME, source.model_config.hf_config
            )

        def rename(named_tensors: NamedTensors) -> NamedTensors:
            if draft is None:
                return named_tensors
            return loader._filter_mtp_weights(named_tensors, source.prefix, draft)

        return self.files(files, use_safetensors, model, rename, name_filter)

    def _load(
        self, named_tensors: List[Tuple[str, Any]], whole: bool
    ) -> Tuple[Set[str], List[str]]:
        """Load tensors of these names, shapes and dtypes into the meta model: the names
        of those that it takes, and of those that it does not."""
        digest = _digest(named_tensors, whole)
        if digest in self._passed:
            return self._passed[digest]
        refuse_twice(named_tensors)
        for weights in self._layers:
            weights.loaded.clear()
        load = _CheckedLoad()
        try:
            self._model.load_weights(load.probes(named_tensors))
        except Exception as error:
            own = isinstance(error, ValueError) and str(error)
            if _is_unsupported_on_meta(error):
                raise CannotCheck(f"{error!r}. {ACCEPT_UNCHECKED}") from error
            raise UpdateRefused(own or repr(error)) from error
        self._refuse_other_shapes(named_tensors)
        taken = load.taken
        untaken = [name for name, _ in named_tensors if name not in taken]
        _refuse_lost_scales(untaken, taken, {n for n, _ in self._model.named_modules()})
        if whole and taken:
            _refuse_missing_scales(named_tensors, load)
            self._refuse_unfilled(load)
        if not whole and not ANY_EXPERT_UPDATE:
            refuse_experts(self._experts_in(load))
        if len(self._passed) == MAX_PASSED:
            del self._passed[next(iter(self._passed))]
        self._passed[digest] = taken, untaken
        return taken, untaken

    def _refuse_another(self, model: torch.nn.Module) -> None:
        gone = sorted(self._expected - _names(model))
        if gone:
            raise UpdateRefused(
                f"the model gave up or renamed {len(gone)} of its parameters after it was "
                f"loaded (LoRA wraps layers): {shorten(gone)}. Restart the server on the "
                "new weights"
            )

    def _refuse_other_shapes(self, named_tensors: List[Tuple[str, Any]]) -> None:
        """Some loaders pad, or take a rank's part of whatever is large enough."""
        for name, tensor in named_tensors:
            shape = self._shapes.get(name, tensor.shape)
            if tuple(shape) != tuple(tensor.shape) and shape.numel() > 1:
                raise UpdateRefused(
                    f"{name} was {list(shape)} at start, got {list(tensor.shape)}"
                )

    def _refuse_nothing(self, untaken: List[str]) -> None:
        if self._is_part:
            return
        if not untaken:
            raise UpdateRefused("the update has no tensors")
        raise UpdateRefused(
            f"the model takes nothing of {len(untaken)} tensors: {shorten(untaken)}"
        )

    def _experts_in(self, load: MetaLoad) -> Set[str]:
        """The tensors that were written into MXFP8 experts."""
        return {
            name
            for storage, owner in self._parameters.items()
            if storage in load.writes and is_mxfp8_expert(owner.module, owner.param)
            for _, names in load.writes[storage].values()
            for name in names
        }

    def _refuse_unfilled(self, load: MetaLoad) -> None:
        unfilled = [
            f"{weights.name}.{name}"
            for weights in self._layers
            for name in weights.unwritten()
        ]
        unfilled += [
            f"{owner.path}.{owner.name}"
            for storage, owner in self._parameters.items()
            if not isinstance(owner.module, self._not_needed)
            and not _is_filled(owner, load.writes[storage])
        ]
        if unfilled:
            raise UpdateRefused(
                f"the checkpoint does not fill the model ({len(unfilled)} parameters): "
                f"{shorten(unfilled)}. Fetch it again, and check that its quantization "
                "config lists the layers that it keeps in bf16"
            )


def _not_needed(model_config) -> Tuple[type, ...]:
    """Types of modules whose parameters no checkpoint has to fill."""
    not_needed = [RadixAttention]  # a KV cache's scales have a default
    if model_config.is_draft_model:
        not_needed.append(VocabParallelEmbedding)  # the target's
    if not model_config.is_generation:
        from sglang.srt.models.bert import BertEmbedding
        from sglang.srt.models.roberta import RobertaEmbedding

        not_needed.append(ParallelLMHead)  # never run
        not_needed += [BertEmbedding, RobertaEmbedding]  # position_ids, never read
    return tuple(not_needed)


class _CheckedLoad(MetaLoad):
    """A load that refuses copies by value of what was quantized, or is to be."""

    def write(self, probe: Probe, target: torch.Tensor, place: Any) -> None:
        if probe.source_dtype != target.dtype:
            refuse_as_values(", ".join(probe.origins), probe.source_dtype, target.dtype)
        super().write(probe, target, place)


def _is_filled(owner: Parameter, writes: Dict[Any, Tuple[int, Set[str]]]) -> bool:
    """Whether these writes leave nothing of a parameter.

    Loaders leave padding as it is: so every part of a fused layer counts as whole.
    """
    if owner.param.numel() <= 1:
        return True  # a number may be read from its tensor, and filled in
    if hasattr(owner.module, "mxfp8_weights") and owner.name in (WEIGHT, SCALE):
        return True  # Mxfp8LinearWeights knows better
    parts = len(getattr(owner.module, "output_sizes", ())) or 1
    if isinstance(owner.module, FusedMoE):
        parts = owner.param.shape[0] * (2 if owner.name.startswith("w13") else 1)
    written = sum(numel for numel, _ in writes.values())
    return len(writes) >= parts or written >= owner.param.numel()


def is_mxfp8_expert(module: torch.nn.Module, param: torch.Tensor) -> bool:
    return isinstance(module, FusedMoE) and param.dtype.itemsize == 1


def refuse_experts(names: Iterable[str]) -> None:
    """Raise UpdateRefused if there are any. Upstream rearranges the scales of MXFP8
    experts at load, and again only after a whole update from disk."""
    names = sorted(names)
    if names:
        raise UpdateRefused(
            f"only a whole update from disk can replace MXFP8 experts: {shorten(names)}"
        )


def refuse_as_values(name: str, source: torch.dtype, target: torch.dtype) -> None:
    """Raise UpdateRefused where a copy would turn quantized bytes into numbers, or
    numbers into bytes."""
    if source.itemsize == 1 and target.is_floating_point and target.itemsize > 1:
        raise UpdateRefused(
            f"{name} is {source}, but its layer is not quantized here (embeddings, heads "
            f"and norms never are): it holds {target}"
        )
    if source.is_floating_point and source.itemsize > 1 and target.itemsize == 1:
        raise UpdateRefused(
            f"{name} is {source}, but its parameter holds {target}: send the bytes of an "
            "MXFP8 checkpoint"
        )
    is_float = source.is_floating_point or target.is_floating_point
    if source.itemsize == target.itemsize == 1 and source != target and is_float:
        raise UpdateRefused(
            f"{name} is {source}, but its parameter holds {target}: send the same bytes "
            "as that"
        )


def _is_unsupported_on_meta(error: Exception) -> bool:
    told = str(error).lower()
    return isinstance(error, NotImplementedError) or "meta" in told or "cuda" in told


def _names(model: torch.nn.Module) -> Set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _digest(named_tensors: List[Tuple[str, Any]], whole: bool) -> bytes:
    digest = hashlib.blake2b(bytes([whole]))
    for name, tensor in named_tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    return digest.digest()


def refuse_twice(named_tensors: List[Tuple[str, Any]]) -> None:
    """Raise UpdateRefused for a tensor that comes twice, if by both names of a scale."""
    seen: Set[str] = set()
    for name, _ in with_mxfp8_names(named_tensors):
        if name in seen:
            raise UpdateRefused(f"{name} comes twice, or as {OTHER_SCALE} as well")
        seen.add(name)


def _refuse_lost_scales(untaken: List[str], taken: Set[str], modules: Set[str]) -> None:
    """Of one of the model's `modules`, or of what they, or their members, are loaded from."""
    for _ in range(2):
        taken = {name.rpartition(".")[0] for name in taken}
        modules |= taken
    for name in filter(IS_SCALE.search, untaken):
        module = name.rpartition(".")[0]
        if module and module in modules:
            raise UpdateRefused(
                f"the model takes {module}, but not {name}; the scale of an MXFP8 layer "
                f"is called {SCALE} or {OTHER_SCALE}, those of a KV cache k_scale and "
                "v_scale"
            )


def _refuse_missing_scales(
    named_tensors: List[Tuple[str, Any]], load: MetaLoad
) -> None:
    """An e4m3 weight that the model takes needs its scale, in the same order."""
    names = {name for name, _ in named_tensors}
    for name, tensor in named_tensors:
        is_weight = tensor.dtype == torch.float8_e4m3fn and name.endswith(WEIGHT)
        if is_weight and name in load.taken:
            layer = name.removesuffix(WEIGHT)
            scales = names & {f"{layer}{SCALE}", f"{layer}{OTHER_SCALE}"}
            if not scales:
                raise UpdateRefused(
                    f"the checkpoint lacks the scale of {name}, {layer}{SCALE}"
                )
            if name in load.rearranged and not scales <= load.rearranged:
                raise UpdateRefused(
                    f"sglang's model rearranges {name} as it loads it, and not its scale: "
                    "keep this layer in bf16"
                )
