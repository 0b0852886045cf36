"""Checkpoints of a tiny Qwen3 in MXFP8, written and loaded on a CPU."""

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Dict, Optional

import torch
from safetensors.torch import save_file

from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import get_model_loader
from sglang.test.layer_ut_utils import init_single_process_dist
from sglang.test.mxfp8_linears import random_mxfp8

SIZE, HEADS = 128, 2
LAYERS = [f"model.layers.{i}" for i in range(2)]
PARTS = [f"self_attn.{name}_proj" for name in "qkvo"]
PARTS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEARS = [f"{layer}.{part}" for layer in LAYERS for part in PARTS]
NORMS = {"input_layernorm": SIZE, "post_attention_layernorm": SIZE}
NORMS |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), SIZE // HEADS)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": SIZE // HEADS,
    "tie_word_embeddings": True,
}
MXFP8 = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, 32],
    "scale_fmt": "ue8m0",
}


def random_tensors(seed: int = 0) -> Dict[str, torch.Tensor]:
    """All linears in MXFP8, which are [SIZE, SIZE]; the rest in bf16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens": (SIZE, SIZE), "model.norm": (SIZE,)}
    shapes |= {f"{layer}.{n}": (size,) for layer in LAYERS for n, size in NORMS.items()}
    found = {
        f"{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }
    for i, name in enumerate(LINEARS):
        weight, scale = random_mxfp8(SIZE, SIZE, 100 * seed + i)
        found |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
    return found


def write_checkpoint(
    directory: str, tensors: Dict[str, torch.Tensor], quantization: Optional[dict]
) -> str:
    """A new folder, since configs are cached by path."""
    folder = mkdtemp(dir=directory)
    save_file(tensors, f"{folder}/model.safetensors")
    declared = {"quantization_config": quantization} if quantization else {}
    Path(folder, "config.json").write_text(json.dumps({**CONFIG, **declared}))
    return folder


def load_checkpoint(path: str, flag: Optional[str] = None) -> torch.nn.Module:
    """The model, by the default loader, with `--quantization flag`."""
    init_single_process_dist()
    config = ModelConfig(path, quantization=flag)
    loader = get_model_loader(LoadConfig(), config)
    return loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))
