"""What a checkpoint's files say of their tensors before any is read."""

import json
import os
import zipfile
from typing import Dict, Iterable, Iterator, List, NamedTuple, Set, Tuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.layers.quantization.mxfp8.agreement import UpdateRefused

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
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                view = tensors.get_slice(name)
                dtype = _SAFETENSORS_DTYPES[view.get_dtype()]
                yield name, Header(dtype, view.get_shape())
    except (SafetensorError, OSError) as error:
        raise UpdateRefused(f"{file} cannot be read: {error}") from error
    except KeyError as error:
        raise UpdateRefused(f"{file}: {name} has the unknown dtype {error}") from error


def _read_pickle(file: str) -> Iterable[Tuple[str, torch.Tensor]]:
    try:
        mmap = zipfile.is_zipfile(file)  # torch maps no older format
        tensors = torch.load(file, map_location="meta", mmap=mmap, weights_only=True)
    except Exception as error:  # whatever a damaged zip or pickle raises
        raise UpdateRefused(f"{file} cannot be read: {error}") from error
    return [named for named in tensors.items() if isinstance(named[1], torch.Tensor)]


def read_index(folder: str) -> Dict[str, str]:
    """The file of each tensor, by the index of a checkpoint; empty if it has none.

    Raises UpdateRefused for an index that cannot be read, or that has nothing.
    """
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    if not os.path.exists(index):
        return {}
    try:
        with open(index) as file:
            weight_map = json.load(file)["weight_map"]
        if weight_map and all(map(os.path.basename, weight_map.values())):
            return weight_map
        error = "it lists no files"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as caught:
        error = repr(caught)
    raise UpdateRefused(
        f"{index} is no index of a checkpoint: {error}. Fetch it again, or remove it if "
        "the folder is complete without it"
    )


def check_index(files: List[str], names: Set[str]) -> None:
    """Raises UpdateRefused when a file is missing that the checkpoint's index lists.

    Of one that is there, the index may list more: what the model needs is checked.
    """
    folder = os.path.dirname(files[0])
    weight_map = read_index(folder)
    for name in sorted(set(weight_map) - names):
        if not os.path.exists(os.path.join(folder, weight_map[name])):
            raise UpdateRefused(
                f"{folder}/{SAFE_WEIGHTS_INDEX_NAME} has {name} in {weight_map[name]}, "
                "which is not there: fetch the checkpoint again"
            )
