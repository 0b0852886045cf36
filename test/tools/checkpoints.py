"""What the tests of checkpoints share: a tiny Llama, and how files are read and written."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sglang.test.mxfp8_utils import TINY_LLAMA, same_bytes


def save_tiny_llama(output: Path, **changes) -> None:
    """In bf16, with random weights, the same ones each time."""
    config = {**TINY_LLAMA, **changes}
    del config["quantization_config"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.bfloat16().save_pretrained(output)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; none is in two files."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        content = load_file(file)
        assert not content.keys() & tensors.keys()
        tensors.update(content)
    return tensors


def read_config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def write(path: Path, tensors: dict, config: dict) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def same_tensors(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and same_bytes(left[name], right[name])
        for name in left
    )
