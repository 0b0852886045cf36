"""A tiny Llama with random weights, the same ones each time, and how checkpoints are read.

Each of its linears, as sglang merges them, has N % 128 == 0 and K % 256 == 0, so that
flashinfer_trtllm takes them all; SmolLM2's has neither. It answers nothing sensible.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    vocab_size=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def make_synthetic_model(output: Path, tie_word_embeddings: bool = True) -> None:
    """Save the model at `output`, in bf16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**CONFIG, tie_word_embeddings=tie_word_embeddings)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(output)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; none is in two files."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        content = load_file(file)
        assert not content.keys() & tensors.keys()
        tensors.update(content)
    return tensors


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def quantization_config(path: Path) -> dict:
    return read_json(path / "config.json")["quantization_config"]


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


def same_tensors(left: Path, right: Path) -> bool:
    left, right = read_tensors(left), read_tensors(right)
    return left.keys() == right.keys() and all(
        same_bytes(left[name], right[name]) for name in left
    )
