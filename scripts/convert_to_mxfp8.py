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
with 2 and one line on stderr for what cannot be converted.
"""

from in_venv import run_in_venv

if __name__ == "__main__":
    run_in_venv()

import argparse
import contextlib
import re
import shutil
import sys
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from checkpoint_files import (
    CONFIG,
    INDEX,
    SINGLE_FILE,
    CheckpointError,
    Tensor,
    open_shard,
    read_config,
    read_headers,
    write_json,
)
from mxfp8_choice import choose, own_list
from mxfp8_config import FORMATS, GROUP_SIZE, HF_QUANT_CONFIG
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
        convert(
            args.input,
            args.output,
            format=args.format,
            ignore=args.ignore,
            max_shard_bytes=args.max_shard_size,
            device=args.device,
            overwrite=args.overwrite,
        )
    except CheckpointError as error:
        reason = str(error)
    except (OSError, SafetensorError) as error:
        reason = f"{args.output} was not written: {error}"
    else:
        return 0
    print(f"convert_to_mxfp8: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def convert(
    source: Path,
    output: Path,
    format: str = "sglang",
    ignore: Sequence[str] = (),
    max_shard_bytes: int = 2 * 10**9,
    device: str = "cpu",
    overwrite: bool = False,
) -> None:
    """Convert the checkpoint in `source` and put the result at `output`, all or nothing.

    `format` is a name in FORMATS.

    Raises CheckpointError before writing where the input, the patterns in `ignore` or
    the output directory do not allow it, and while converting where a weight is not
    finite or a file is damaged. Raises OSError or SafetensorError where the output
    cannot be written.
    """
    _check_paths(source, output, overwrite)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError("no CUDA device is visible: leave --device cuda out")
    config = read_config(source)
    tensors = read_headers(source)
    _refuse_quantized(source, config, tensors)
    choice = choose(source, tensors, ignore)
    form = FORMATS[format]
    listed = own_list(choice) if format == "sglang" else sorted(choice.kept)
    config["quantization_config"], sidecars = form.describe(listed)
    shards = _plan_shards(tensors, choice.converted, max_shard_bytes)

    with staged_directory(output) as staging:
        size = 0
        weight_map: Dict[str, str] = {}
        with tqdm(total=len(tensors), unit="tensor", desc="Converting") as progress:
            for number, shard in enumerate(shards, start=1):
                file = _shard_name(number, len(shards))
                content = {}
                for tensor, value in _read_tensors(source, shard):
                    if tensor.name in choice.converted:
                        value, scale = _quantize(tensor, value, device)
                        content[f"{tensor.name}{form.scale_suffix}"] = scale
                    content[tensor.name] = value
                    progress.update()
                save_file(content, staging / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(content, file))
                size += sum(value.nbytes for value in content.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(staging / INDEX, index)
        # The tokenizer and whatever else there is, but no weights.
        skipped = shutil.ignore_patterns(*WEIGHT_FILES, ".git", ".cache")
        shutil.copytree(source, staging, ignore=skipped, dirs_exist_ok=True)
        for file, settings in {CONFIG: config, **sidecars}.items():
            write_json(staging / file, settings)

    before, linears = sum(tensor.bytes for tensor in tensors), len(choice.converted)
    print(
        f"{output}: {linears} linears in MXFP8, {len(tensors) - linears} "
        f"tensors as they were, {before / 1e6:.0f} MB became {size / 1e6:.0f} MB"
    )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("output", type=Path, help="directory to create")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="sglang",
        help="whose names and configs to write (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="GLOB",
        help="keep matching linears as they are, e.g. '*.down_proj' or "
        "'model.layers.0.*' (module names, without .weight; repeatable)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_parse_size,
        default="2GB",
        metavar="SIZE",
        help="largest output file, e.g. 500MB (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where to quantize"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing output directory"
    )
    return parser.parse_args(argv)


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = match and int(
        float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]
    )
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: say 500MB or 2GB")
    return size


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


def _refuse_quantized(source: Path, config: dict, tensors: List[Tensor]) -> None:
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
    tensors: Sequence[Tensor], converted: Iterable[str], max_bytes: int
) -> List[List[Tensor]]:
    shards: List[List[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        length = tensor.bytes
        if tensor.name in converted:
            values = tensor.shape[0] * tensor.shape[1]
            length = values + values // GROUP_SIZE
        if shards[-1] and size + length > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += length
    return shards


def _shard_name(number: int, total: int) -> str:
    return SINGLE_FILE if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"


def _read_tensors(
    source: Path, shard: Sequence[Tensor]
) -> Iterator[Tuple[Tensor, torch.Tensor]]:
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(open_shard(source / name))
            for name in dict.fromkeys(tensor.file for tensor in shard)
        }
        for tensor in shard:
            yield tensor, files[tensor.file].get_tensor(tensor.name)


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
