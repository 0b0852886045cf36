"""What a checkpoint's files say of their tensors before any is read."""

import json
import os
import zipfile
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Tuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.layers.quantization.mxfp8.agreement import UpdateRefused

WEIGHT, SCALE = "weight", "weight_scale_inv"
# What a scale is called in checkpoints of ModelOpt and compressed-tensors.
OTHER_SCALE = "weight_scale"
# The load formats whose weights go from files through the parameters' loaders, as they
# are. flash_rl would replace the parameters and model.load_weights for good.
_FILE_FORMATS = (
    "auto",
    "safetensors",
    "fastsafetensors",
    "instanttensor",  # which 0.5.9 does not have
    "pt",
    "mistral",
    "npcache",
)


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    dtype: torch.dtype
    shape: Tuple[int, ...]


def with_mxfp8_names(named_tensors: Iterable[Tuple[str, Any]]) -> Iterator:
    """The tensors of a checkpoint by the names that sglang's MXFP8 loaders know."""
    for name, tensor in named_tensors:
        is_other = name.endswith(f".{OTHER_SCALE}")
        yield name.removesuffix(OTHER_SCALE) + SCALE if is_other else name, tensor


def reads_files(load_config: LoadConfig) -> bool:
    """Whether a checkpoint's tensors are read from its files by name."""
    return load_config.load_format in _FILE_FORMATS


def read_headers(files: List[str], use_safetensors: bool) -> List[Tuple[str, Header]]:
    """The tensors of a checkpoint's files, by name.

    Raises UpdateRefused for a damaged file, and for a tensor that stands in two files.
    """
    read = _read_safetensors if use_safetensors else _read_pickle
    found: Dict[str, Tuple[str, Header]] = {}
    for file in files:
        for name, header in read(file):
            if name in found:
                raise UpdateRefused(
                    f"{name} stands in {found[name][0]} and in {file}: remove one of them"
                )
            found[name] = file, header
    return [(name, header) for name, (_, header) in found.items()]


def _read_safetensors(file: str) -> Iterator[Tuple[str, Header]]:
    dtypes: Dict[str, torch.dtype] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                view = tensors.get_slice(name)
                kind = view.get_dtype()
                if kind not in dtypes:
                    nothing = view[:0] if view.get_shape() else view[...]
                    dtypes[kind] = nothing.dtype
                yield name, Header(dtypes[kind], view.get_shape())
    except (SafetensorError, OSError) as error:
        raise UpdateRefused(f"{file} cannot be read: {error}") from error
    except RuntimeError as error:  # of F4, which is packed
        raise UpdateRefused(f"{file}: {name} has the unknown dtype {kind}") from error


def _read_pickle(file: str) -> Iterable[Tuple[str, torch.Tensor]]:
    try:
        mmap = zipfile.is_zipfile(file)  # torch maps no older format
        tensors = torch.load(file, map_location="meta", mmap=mmap, weights_only=True)
    except Exception as error:  # whatever a damaged zip or pickle raises
        raise UpdateRefused(f"{file} cannot be read: {error}") from error
    return [named for named in tensors.items() if isinstance(named[1], torch.Tensor)]


def read_index(folder: str) -> Dict[str, str]:
    """The files that a checkpoint's index lists, and a tensor in each; empty without one.

    Raises UpdateRefused for an index that cannot be read, or that has nothing.
    """
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not os.path.exists(index):
        return {}
    try:
        with open(index) as file:
            weight_map = json.load(file)["weight_map"]
        tensors = {
            os.path.join(folder, part): name for name, part in weight_map.items()
        }
        if not tensors or os.path.join(folder, "") in tensors:
            raise ValueError("it lists no files")
        return tensors
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UpdateRefused(
            f"{index} is no index of a checkpoint: {error!r}. Fetch it again, or remove it "
            "if the folder is complete without it"
        ) from error


def check_index(folder: str) -> None:
    """Raises UpdateRefused where a checkpoint's index lists a file which is not there.

    Of one that is there, the index may list more: what the model needs is checked.
    """
    for part, name in read_index(folder).items():
        if not os.path.exists(part):
            raise UpdateRefused(
                f"{folder}/{SAFE_WEIGHTS_INDEX_NAME} has {name} in "
                f"{os.path.basename(part)}, which is not there: fetch the checkpoint again"
            )
