"""Which of a checkpoint's tensors become MXFP8, and what its list of the others says."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Iterable, List, Sequence, Set

from checkpoint_files import CheckpointError, Tensor
from mxfp8_config import GROUP_SIZE

# Towers for images and sound are kept: they are small, and lose more than the text does.
TOWERS = ("*visual*", "*vision*", "*audio*")
CONVERTIBLE = ("BF16", "F16", "F32", "F64")


@dataclass
class Choice:
    """What to convert, and the names of what becomes MXFP8 and of what does not.

    A layer has its names in the checkpoint and in sglang, which may merge it with others.
    """

    converted: Set[str] = field(default_factory=set)  # tensors
    layers: Set[str] = field(default_factory=set)  # in MXFP8
    kept_layers: Set[str] = field(default_factory=set)  # that could have been in MXFP8
    kept: Set[str] = field(default_factory=set)  # of the checkpoint, of any kind


def choose(source: Path, tensors: List[Tensor], ignore: Sequence[str]) -> Choice:
    """What sglang can have in MXFP8, but for the modules that match `ignore`.

    Raises CheckpointError where sglang could not load, or MXFP8 not hold, the result.
    """
    try:
        from ask_sglang import quantizable_layers  # imports sglang
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"the patched sglang is not installed here ({error}): run ./scripts/setup.sh"
        ) from error
    for tensor in tensors:
        if _is_weight(tensor) and not tensor.bytes:
            raise CheckpointError(
                f"{tensor.name} is {list(tensor.shape)}, without values: fetch the "
                "checkpoint again"
            )
    by_name = {tensor.name: tensor for tensor in tensors}
    choice = Choice()
    for layer in quantizable_layers(source, tensors):
        weights = [t for n in sorted(layer.tensors) if _is_weight(t := by_name[n])]
        kept = [w.module for w in weights if _matches(w.module, [*ignore, *TOWERS])]
        if kept and len(kept) < len(weights):
            parts = ", ".join(w.module.rpartition(".")[2] for w in weights[:4])
            raise CheckpointError(
                f"{kept[0]} is kept but another part of sglang's {layer.path} is not: "
                f"--ignore all or none of {parts}"
            )
        names = {layer.path, layer.prefix, *(_as_listed(w.module) for w in weights)}
        if kept or layer.transposed or not _are_linears(weights):
            choice.kept_layers.update(names - {""})
        else:
            choice.layers.update(names)
            choice.converted.update(weight.name for weight in weights)
    others = [t for t in tensors if _is_weight(t) and t.name not in choice.converted]
    for pattern in ignore:
        if not any(fnmatchcase(tensor.module, pattern) for tensor in others):
            example = min(choice.converted or by_name).removesuffix(".weight")
            raise CheckpointError(
                f"--ignore {pattern!r} matches no linear: module names look like "
                f"{example!r}"
            )
    if not choice.converted:
        raise CheckpointError(
            "no linear is left to convert, of those that sglang can have in MXFP8"
            + (": use fewer --ignore patterns" if ignore else "")
        )
    choice.kept.update(_as_listed(tensor.module) for tensor in others)
    return choice


def _is_weight(tensor: Tensor) -> bool:
    is_named = tensor.name.endswith(".weight") or ".experts." in tensor.name
    return is_named and len(tensor.shape) > 1 and tensor.dtype in CONVERTIBLE


def _are_linears(weights: List[Tensor]) -> bool:
    """Whether these are [N, K]; raises CheckpointError for what MXFP8 cannot hold."""
    for weight in weights:
        if ".experts." in weight.name and len(weight.shape) == 3:
            raise CheckpointError(
                f"{weight.name} holds all experts in one 3-D tensor, which is no linear: "
                "save the checkpoint with one tensor per expert first, or keep them as "
                "they are with --ignore '*.experts.*'"
            )
        if len(weight.shape) == 2 and weight.shape[1] % GROUP_SIZE:
            raise CheckpointError(
                f"{weight.name} has K = {weight.shape[1]}, which is not a multiple of "
                f"{GROUP_SIZE}: keep it as it is with --ignore "
                f"'*.{weight.module.rpartition('.')[2]}'"
            )
    return bool(weights) and all(len(weight.shape) == 2 for weight in weights)


def _as_listed(module: str) -> str:
    """Experts are one layer, and one entry of a list."""
    before, experts, _ = module.partition(".experts.")
    return f"{before}.experts" if experts else module


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def own_list(choice: Choice) -> List[str]:
    """What stays as it is; sglang skips every layer whose name contains a listed one."""
    quantized = "\n".join(sorted(choice.layers))
    for name in sorted(choice.kept_layers):
        if name in quantized:
            hit = next(layer for layer in sorted(choice.layers) if name in layer)
            raise CheckpointError(
                f"{name} stays as it is, and sglang would then skip {hit} too, whose name "
                f"contains it: add --ignore '{hit}'"
            )
    others = {n for n in choice.kept if n not in quantized and "embed" not in n}
    return sorted(choice.kept_layers | others)
