"""A Hugging Face checkpoint as its config and its files' headers say it is."""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Tuple

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class CheckpointError(Exception):
    """What is wrong with a checkpoint; the message names the cause and the way out."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: where it is, and what its header says."""

    name: str
    file: str
    dtype: str  # by safetensors' name
    shape: Tuple[int, ...]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def bytes(self) -> int:
        bits = re.match(r"[A-Z]+(\d+)", self.dtype)
        return math.prod(self.shape) * (int(bits[1]) if bits else 8) // 8


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: give the directory of a Hugging Face "
            "checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): fetch it again"
        ) from error


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_headers(source: Path) -> List[Tensor]:
    """The checkpoint's tensors, file by file; of two of a name, the one in the index."""
    weight_map = {}
    if (source / INDEX).is_file():
        weight_map = read_json(source / INDEX).get("weight_map", {})
    elif not (source / SINGLE_FILE).is_file():
        raise CheckpointError(
            f"{source} has neither {SINGLE_FILE} nor {INDEX}: load it with transformers "
            "and save_pretrained() it as safetensors"
        )
    tensors = []
    for file in sorted(set(weight_map.values())) or [SINGLE_FILE]:
        with open_shard(source / file) as shard:
            for name in shard.keys():
                if weight_map.get(name, file) == file:
                    header = shard.get_slice(name)
                    shape = tuple(header.get_shape())
                    tensors.append(Tensor(name, file, header.get_dtype(), shape))
    for name in sorted(weight_map.keys() - {tensor.name for tensor in tensors}):
        raise CheckpointError(
            f"{weight_map[name]} lacks {name}, which {INDEX} puts there: fetch the "
            "checkpoint again"
        )
    return tensors


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch the checkpoint again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): fetch the checkpoint again"
        ) from error
