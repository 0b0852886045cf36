#!/usr/bin/env python3
"""Make a tiny Llama checkpoint with random weights, the same ones for the same seed.

    make_synthetic_model.py OUTPUT [--tokenizer DIR] [--seed 0]

Each of its linears, as sglang merges them, has N % 128 == 0 and K % 256 == 0, so that
flashinfer_trtllm takes them all; SmolLM2's has neither. It answers nothing sensible.
"""

import argparse
import sys
from pathlib import Path

import torch
from staging import staged_directory
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="checkpoint to take it from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_synthetic_model(args.output, args.tokenizer, args.seed)


def make_synthetic_model(
    output: Path, tokenizer: Path | None = None, seed: int = 0, **config
) -> None:
    """Save the model at `output`, in bf16; `config` overrides LlamaConfig's fields."""
    settings = dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        vocab_size=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with staged_directory(output) as staging:
        if tokenizer is not None:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
            loaded.save_pretrained(staging)
            settings["vocab_size"] = len(loaded)
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
        torch.random.set_rng_state(generator_state)
        model.to(torch.bfloat16).save_pretrained(staging)


if __name__ == "__main__":
    sys.exit(main())
