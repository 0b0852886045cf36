#!/usr/bin/env python3
"""Convert a Hugging Face checkpoint to an MXFP8 checkpoint that sglang loads.

    convert_to_mxfp8.py INPUT OUTPUT [--format FORMAT] [--ignore GLOB ...]

The model that sglang builds says which weights can be quantized: those of its linears and
experts. Their `weight` [N, K] becomes float8_e4m3fn with one E8M0 byte per 32 values of
K, uint8 [N, K/32]; all else stays as it is, as do linears that --ignore names. The bytes
are the same in every format, names and configs are not:

    sglang              `weight_scale_inv`; `quantization_config` in config.json
    modelopt            `weight_scale`; as NVIDIA's ModelOpt, hf_quant_config.json too
    compressed-tensors  `weight_scale`; as llm-compressor, "mxfp8-quantized"

Everything is checked before anything is written. Tensors are streamed: memory holds one
output shard (twice, while it is saved) and one tensor, whatever the model's size. Exits
with 2 and one line on stderr for what cannot be converted. Needs .venv
(./scripts/setup.sh); no GPU.
"""

from in_venv import run_in_venv

if __name__ == "__main__":
    run_in_venv()

import argparse
import itertools
import re
import shutil
import sys
from pathlib import Path
from typing import Container, Iterator, Sequence, Tuple

import torch
from checkpoint_files import (
    INDEX,
    CheckpointError,
    Tensor,
    open_shard,
    read_headers,
    read_json,
    write_json,
)
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from mxfp8_choice import choose, own_list
from mxfp8_config import CONFIG, GROUP_SIZE, HF_QUANT_CONFIG, SCALE_SUFFIXES, describe
from safetensors import SafetensorError
from safetensors.torch import save_file
from staging import staged_directory
from tqdm import tqdm

WEIGHT_FILES = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
# Rows are quantized a chunk at a time: the quantizer's fp32 temporaries are several
# times the size of what it is given.
CHUNK_ELEMENTS = 1 << 24


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    try:
        print(convert(args))
        return 0
    except CheckpointError as error:
        reason = str(error)
    except (OSError, SafetensorError) as error:
        reason = f"{args.output} was not written: {error}"
    print(f"convert_to_mxfp8: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def convert(args: argparse.Namespace) -> str:
    """Convert the checkpoint in args.input and put the result at args.output, all or
    nothing; returns what was done.

    Raises CheckpointError before writing where the input, the patterns or the output
    directory do not allow it, and while converting where a weight is not finite or a
    file is damaged; OSError or SafetensorError where the output cannot be written.
    """
    source, output = args.input, args.output
    _check_paths(source, output, args.overwrite)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("no CUDA device is visible: leave --device cuda out")
    config = read_json(source / CONFIG)
    tensors = read_headers(source)
    _refuse_quantized(source, config, tensors)
    choice = choose(source, tensors, args.ignore)
    listed = own_list(choice) if args.format == "sglang" else sorted(choice.kept)
    settings = describe(args.format, listed)
    config["quantization_config"] = settings[CONFIG]
    plan = _plan_shards(tensors, choice.converted, args.max_shard_size)
    with staged_directory(output) as staging:
        weight_map = {}
        with tqdm(total=len(tensors), unit="tensor", desc="Converting") as progress:
            for file, names in plan.filename_to_tensors.items():
                content = {}
                for tensor, value in _read_tensors(source, tensors, set(names)):
                    if tensor.name in choice.converted:
                        value, scale = _quantize(tensor, value, args.device)
                        content[tensor.name + SCALE_SUFFIXES[args.format]] = scale
                    content[tensor.name] = value
                    progress.update()
                save_file(content, staging / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(content, file))
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": weight_map}
            write_json(staging / INDEX, index)
        # The tokenizer and whatever else there is, but no weights.
        skipped = shutil.ignore_patterns(*WEIGHT_FILES, ".git", ".cache")
        shutil.copytree(source, staging, ignore=skipped, dirs_exist_ok=True)
        for file, content in {**settings, CONFIG: config}.items():
            write_json(staging / file, content)
    before, linears = sum(tensor.bytes for tensor in tensors), len(choice.converted)
    return (
        f"{output}: {linears} linears in MXFP8, {len(tensors) - linears} tensors as they "
        f"were, {before / 1e6:.0f} MB became {plan.metadata['total_size'] / 1e6:.0f} MB"
    )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("input", type=Path, help="Hugging Face checkpoint directory")
    add("output", type=Path, help="directory to create")
    add("--format", choices=SCALE_SUFFIXES, default="sglang", help="default: sglang")
    add(
        "--ignore",
        action="append",
        default=[],
        metavar="GLOB",
        help="keep matching linears as they are, e.g. '*.down_proj' or "
        "'model.layers.0.*' (module names, without .weight; repeatable)",
    )
    size = "largest output file, e.g. 500MB (default: 2GB)"
    add("--max-shard-size", default="2GB", metavar="SIZE", help=size)
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to quantize")
    add("--overwrite", action="store_true", help="replace an existing output directory")
    return parser.parse_args(argv)


def _check_paths(source: Path, output: Path, overwrite: bool) -> None:
    for path in source, output:
        if not str(path).isprintable():
            raise CheckpointError(f"{str(path)!r} is no path in UTF-8: rename it")
    resolved, origin = output.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise CheckpointError(
            f"{output} and {source} lie inside one another: choose another output"
        )
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file: choose another output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{output} is not empty: choose another output, or replace it with --overwrite"
        )


def _refuse_quantized(source: Path, config: dict, tensors: Sequence[Tensor]) -> None:
    declared = config.get("quantization_config") or config.get("compression_config")
    if declared:
        found = f"{CONFIG}: {declared.get('quant_method')}"
    elif (source / HF_QUANT_CONFIG).exists():
        found = HF_QUANT_CONFIG
    else:
        scales = r"(weight_scale(_inv|_2)?|qweight|qzeros|weight_packed)$"
        quantized = (
            f"{tensor.name}: {tensor.dtype}"
            for tensor in tensors
            if tensor.dtype.startswith("F8") or re.search(scales, tensor.name)
        )
        found = next(quantized, None)
    if found:
        raise CheckpointError(
            f"{source} is already quantized ({found}): start from its bf16, fp16 or "
            "fp32 original"
        )


def _plan_shards(
    tensors: Sequence[Tensor], converted: Container[str], max_size: str
) -> StateDictSplit:
    def size(tensor: Tensor) -> int:
        if tensor.name not in converted:
            return tensor.bytes
        values = tensor.shape[0] * tensor.shape[1]
        return values + values // GROUP_SIZE

    try:
        return split_state_dict_into_shards_factory(
            {tensor.name: tensor for tensor in tensors},
            get_storage_size=size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_size,
        )
    except ValueError as error:
        raise CheckpointError(f"--max-shard-size: {error}: say 500MB or 2GB") from error


def _read_tensors(
    source: Path, tensors: Sequence[Tensor], names: Container[str]
) -> Iterator[Tuple[Tensor, torch.Tensor]]:
    wanted = [tensor for tensor in tensors if tensor.name in names]
    for file, group in itertools.groupby(wanted, lambda tensor: tensor.file):
        with open_shard(source / file) as shard:
            for tensor in group:
                yield tensor, shard.get_tensor(tensor.name)


def _quantize(
    tensor: Tensor, weight: torch.Tensor, device: str
) -> Tuple[torch.Tensor, torch.Tensor]:
    from ask_sglang import quantize

    chunks = []
    for chunk in weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1])):
        chunk = chunk.to(device, torch.float32 if chunk.dtype.itemsize > 4 else None)
        if not chunk.isfinite().all():
            raise CheckpointError(
                f"{tensor.name} holds NaN or infinity: fetch the checkpoint again, or keep "
                f"the tensor as it is with --ignore '{tensor.module}'"
            )
        chunks.append([part.cpu() for part in quantize(chunk)])
    values, scales = zip(*chunks)
    # torch.cat has no float8 kernel on every device; bytes are bytes.
    merged = torch.cat([value.view(torch.uint8) for value in values])
    return merged.view(torch.float8_e4m3fn), torch.cat(scales)


if __name__ == "__main__":
    sys.exit(main())
