#!/usr/bin/env python3
"""Convert a Hugging Face checkpoint to an MXFP8 checkpoint that sglang loads.

    convert_to_mxfp8.py INPUT OUTPUT [--format FORMAT] [--ignore GLOB ...]

Every linear's `weight` [N, K] becomes float8_e4m3fn with one E8M0 byte per 32 values of
K, uint8 [N, K/32]. The bytes are the same in every format, names and configs are not:

    sglang              `weight_scale_inv`; `quantization_config` in config.json
    modelopt            `weight_scale`; as NVIDIA's ModelOpt, hf_quant_config.json too
    compressed-tensors  `weight_scale`; as llm-compressor, "mxfp8-quantized"

Embeddings, norms, the output head, MoE routers and vision towers stay as they are, as
do linears that --ignore names. Everything is checked before anything is written.

Tensors are streamed: memory holds one output shard (twice, while it is saved) and one
tensor, whatever the model's size. Exits with 2 and one line on stderr for input that
cannot be converted.
"""

import argparse
import contextlib
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from staging import staged_directory
from tqdm import tqdm

GROUP_SIZE = 32
CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONVERTIBLE = ("BF16", "F16", "F32")

# Two-dimensional weights that sglang does not run as quantized linears.
NEVER_CONVERTED = (
    "*embed*",
    "*norm*",
    "lm_head",
    "*.lm_head",
    "*.gate",
    "*.router",
    "*.shared_expert_gate",
    "*visual*",
    "*vision*",
)
# sglang merges these linears into one, so they must share a format.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
WEIGHT_FILES = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")
# Rows are quantized a chunk at a time: the quantizer's fp32 temporaries are several
# times the size of what it is given.
CHUNK_ELEMENTS = 1 << 24


class ConversionError(Exception):
    """The input cannot be converted; the message names the cause and the way out."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the input: where it is, and what its header says."""

    name: str
    file: str
    dtype: str
    shape: Tuple[int, ...]
    bytes: int

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Choice:
    """What becomes MXFP8 and what stays, by module name.

    `fused` names the merged linears of sglang whose parts are all kept.
    """

    converted: List[Tensor]
    kept: List[str]
    fused: List[str]


@dataclass(frozen=True)
class Format:
    """One form of MXFP8 checkpoint: the name of its scales, and what its configs say.

    `describe` gives the `quantization_config` and what else to write beside config.json,
    by file name.
    """

    scale_suffix: str
    describe: Callable[[Choice], Tuple[dict, Dict[str, dict]]]


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
    except ConversionError as error:
        print(f"convert_to_mxfp8: {error}", file=sys.stderr)
        return 2
    return 0


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

    Raises ConversionError before writing where the input, the patterns in `ignore` or
    the output directory do not allow it, and while converting where a weight is not
    finite or a file is damaged.
    """
    _check_output(source, output, overwrite)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConversionError("no CUDA device is visible: leave --device cuda out")
    config = _read_config(source)
    tensors = _read_headers(source)
    choice = _choose(tensors, ignore)
    form = FORMATS[format]
    quantization_config, sidecars = form.describe(choice)
    names = {tensor.name for tensor in choice.converted}
    shards = _plan_shards(tensors, names, max_shard_bytes)
    quantize = _load_quantizer()

    with staged_directory(output) as staging:
        size = 0
        weight_map: Dict[str, str] = {}
        with tqdm(total=len(tensors), unit="tensor", desc="Converting") as progress:
            for number, shard in enumerate(shards, start=1):
                file = _shard_name(number, len(shards))
                content = {}
                for tensor, value in _read_tensors(source, shard):
                    if tensor.name in names:
                        value, scale = _quantize(tensor, value, quantize, device)
                        content[f"{tensor.name}{form.scale_suffix}"] = scale
                    content[tensor.name] = value
                    progress.update()
                save_file(content, staging / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(content, file))
                size += sum(value.nbytes for value in content.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(staging / INDEX, index)
        _copy_other_files(source, staging)
        config["quantization_config"] = quantization_config
        for file, settings in {CONFIG: config, **sidecars}.items():
            _write_json(staging / file, settings)

    before = sum(tensor.bytes for tensor in tensors)
    print(
        f"{output}: {len(names)} linears in MXFP8, {len(tensors) - len(names)} "
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


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    resolved, origin = output.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents or origin in resolved.parents:
        raise ConversionError(
            f"{output} and {source} lie inside one another: choose another output"
        )
    if output.exists() and not output.is_dir():
        raise ConversionError(f"{output} is a file: choose another output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConversionError(
            f"{output} is not empty: choose another output, or replace it with --overwrite"
        )


def _read_config(source: Path) -> dict:
    if not (source / CONFIG).is_file():
        raise ConversionError(
            f"{source} has no {CONFIG}: give the directory of a Hugging Face checkpoint"
        )
    config = _read_json(source / CONFIG)
    for name, settings in (
        (CONFIG, config.get("quantization_config")),
        (CONFIG, config.get("compression_config")),
        (HF_QUANT_CONFIG, (source / HF_QUANT_CONFIG).exists()),
    ):
        if settings:
            method = (
                settings.get("quant_method") if isinstance(settings, dict) else None
            )
            raise ConversionError(
                f"{source} is already quantized ({name}{f': {method}' if method else ''}): "
                "start from its bf16, fp16 or fp32 original"
            )
    return config


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"{path} is not JSON ({error}): fetch it again"
        ) from error


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_headers(source: Path) -> List[Tensor]:
    """List the checkpoint's tensors, file by file, from the files' headers alone."""
    if (source / INDEX).is_file():
        weight_map = _read_json(source / INDEX).get("weight_map", {})
        files = sorted(set(weight_map.values()))
    elif (source / SINGLE_FILE).is_file():
        weight_map, files = {}, [SINGLE_FILE]
    else:
        raise ConversionError(
            f"{source} has neither {SINGLE_FILE} nor {INDEX}: load it with transformers "
            "and save_pretrained() it as safetensors"
        )
    tensors = []
    for file in files:
        with _open(source / file) as shard:
            for name in shard.keys():
                if weight_map.get(name, file) != file:
                    continue
                header = shard.get_slice(name)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                tensors.append(Tensor(name, file, dtype, shape, _bytes(dtype, shape)))
    missing = sorted(weight_map.keys() - {tensor.name for tensor in tensors})
    if missing:
        raise ConversionError(
            f"{weight_map[missing[0]]} lacks {missing[0]}, which {INDEX} puts there: "
            "fetch the checkpoint again"
        )
    return tensors


@contextlib.contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise ConversionError(f"{path} is missing: fetch the checkpoint again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ConversionError(
            f"{path} is damaged ({error}): fetch the checkpoint again"
        ) from error


def _bytes(dtype: str, shape: Iterable[int]) -> int:
    bits = re.match(r"[A-Z]+(\d+)", dtype)
    return math.prod(shape) * (int(bits[1]) if bits else 8) // 8


def _choose(tensors: Sequence[Tensor], ignore: Sequence[str]) -> Choice:
    """Split the two-dimensional weights into those to convert and those to keep.

    Raises ConversionError where sglang could not load, or MXFP8 not hold, the result.
    """
    for tensor in tensors:
        if tensor.dtype.startswith("F8") or re.search(
            r"(weight_scale(_inv|_2)?|qweight|qzeros|weight_packed)$", tensor.name
        ):
            raise ConversionError(
                f"{tensor.name} ({tensor.dtype}) is already quantized: start from the "
                "checkpoint's bf16, fp16 or fp32 original"
            )
        if "experts" in tensor.name and len(tensor.shape) == 3:
            raise ConversionError(
                f"{tensor.name} holds all experts in one 3-D tensor, which is no linear: "
                "save the checkpoint with one tensor per expert first"
            )

    candidates = [
        tensor
        for tensor in tensors
        if tensor.name.endswith(".weight")
        and len(tensor.shape) == 2
        and tensor.dtype in CONVERTIBLE
    ]
    linears = [t for t in candidates if not _matches(t.module, NEVER_CONVERTED)]
    for pattern in ignore:
        if not any(fnmatchcase(tensor.module, pattern) for tensor in candidates):
            raise ConversionError(
                f"--ignore {pattern!r} matches no linear: module names look like "
                f"{(linears or tensors)[0].module!r}"
            )
    converted = [t for t in linears if not _matches(t.module, ignore)]
    if not converted:
        raise ConversionError(
            "no linear is left to convert: use fewer --ignore patterns"
        )
    converted_modules = {tensor.module for tensor in converted}
    kept = [
        tensor.module for tensor in candidates if tensor.module not in converted_modules
    ]
    fused = _fused_names(converted_modules, _not_embeddings(kept))

    for tensor in converted:
        if tensor.shape[1] % GROUP_SIZE != 0:
            raise ConversionError(
                f"{tensor.name} has K = {tensor.shape[1]}, which is not a multiple of "
                f"{GROUP_SIZE}: keep it as it is with --ignore '{_like(tensor.module)}'"
            )
    for name in kept:
        if ".experts." in name:
            raise ConversionError(
                f"{name} is an expert, and sglang quantizes all experts or none: leave "
                "them out of --ignore"
            )
    return Choice(converted, kept, fused)


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def _like(module: str) -> str:
    """A pattern for the same linear in every layer."""
    return f"*.{module.rpartition('.')[2]}"


def _fused_names(converted: Iterable[str], kept: Iterable[str]) -> List[str]:
    """Names of sglang's merged linears whose parts are all kept.

    sglang 0.5.9 asks for the merged name and does not look for its parts.
    """
    fused = []
    converted, kept = set(converted), set(kept)
    for name, parts in FUSED.items():
        parents = dict.fromkeys(
            module.rpartition(".")[0]
            for module in sorted(kept)
            if module.rpartition(".")[2] in parts
        )
        for parent in parents:
            prefix = f"{parent}." if parent else ""
            quantized = [part for part in parts if f"{prefix}{part}" in converted]
            present = [part for part in parts if f"{prefix}{part}" in kept]
            if quantized:
                raise ConversionError(
                    f"{prefix}{present[0]} is kept but {prefix}{quantized[0]} is not, and "
                    f"sglang merges them into one {name}: --ignore all or none of "
                    f"{', '.join(parts)}"
                )
            if len(present) > 1:
                fused.append(f"{prefix}{name}")
    return fused


def _not_embeddings(modules: Iterable[str]) -> List[str]:
    return [module for module in modules if "embed" not in module]


def _with_head(modules: Sequence[str]) -> List[str]:
    """The names sorted; a head that is tied, and so has no tensor, is listed too."""
    tied = not any(_matches(module, ("lm_head", "*.lm_head")) for module in modules)
    return sorted([*modules, "lm_head"] if tied else modules)


def _check_substrings(converted: Iterable[str], kept: Iterable[str]) -> None:
    # sglang skips a layer when any listed name is a substring of its name.
    merged = {part: name for name, parts in FUSED.items() for part in parts}
    names = set(converted)
    for module in converted:
        parent, dot, last = module.rpartition(".")
        names.add(f"{parent}{dot}{merged.get(last, last)}")
    everything = "\n".join(names)
    for name in kept:
        if name in everything:
            hit = next(module for module in sorted(names) if name in module)
            raise ConversionError(
                f"{name} stays as it is, and sglang would then skip {hit} too, whose name "
                f"contains it: add --ignore '{hit}'"
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


def _load_quantizer():
    # sglang's import is slow and, without a CUDA driver, needs the stand-in.
    if not torch.cuda.is_available():
        sys.path.insert(0, str(Path(__file__).resolve().parent / "cpu_stand_ins"))
    try:
        from sglang.srt.layers.quantization.mxfp8_emulation import quantize
    except ModuleNotFoundError as error:
        raise ConversionError(
            f"the patched sglang is not installed here ({error}): run ./scripts/setup.sh "
            "and use .venv/bin/python"
        ) from error
    return quantize


def _read_tensors(
    source: Path, shard: Sequence[Tensor]
) -> Iterator[Tuple[Tensor, torch.Tensor]]:
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(_open(source / name))
            for name in dict.fromkeys(tensor.file for tensor in shard)
        }
        for tensor in shard:
            yield tensor, files[tensor.file].get_tensor(tensor.name)


def _quantize(
    tensor: Tensor, weight: torch.Tensor, quantize, device: str
) -> Tuple[torch.Tensor, torch.Tensor]:
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    chunks = []
    for chunk in weight.split(rows):
        if not chunk.isfinite().all():
            raise ConversionError(
                f"{tensor.name} holds NaN or infinity: fetch the checkpoint again, or keep "
                f"the tensor as it is with --ignore '{tensor.module}'"
            )
        chunks.append([part.cpu() for part in quantize(chunk.to(device))])
    values, scales = zip(*chunks)
    # torch.cat has no float8 kernel on every device; bytes are bytes.
    merged = torch.cat([value.view(torch.uint8) for value in values])
    return merged.view(torch.float8_e4m3fn), torch.cat(scales)


def _sglang_config(choice: Choice) -> Tuple[dict, Dict[str, dict]]:
    unquantized = _not_embeddings(choice.kept) + choice.fused
    _check_substrings([tensor.module for tensor in choice.converted], unquantized)
    config = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, GROUP_SIZE],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": sorted(unquantized),
    }
    return config, {}


def _modelopt_config(choice: Choice) -> Tuple[dict, Dict[str, dict]]:
    unquantized = _with_head(choice.kept)
    # Readers look at the producer; the version is that whose form is followed here.
    producer = {"name": "modelopt", "version": "0.47.0"}
    config = {
        "ignore": unquantized,
        "quant_algo": "MXFP8",
        "producer": producer,
        "quant_method": "modelopt",
    }
    quantization = {
        "quant_algo": "MXFP8",
        "kv_cache_quant_algo": None,
        "group_size": GROUP_SIZE,
        "exclude_modules": unquantized,
    }
    sidecar = {"producer": producer, "quantization": quantization}
    return config, {HF_QUANT_CONFIG: sidecar}


def _compressed_tensors_config(choice: Choice) -> Tuple[dict, Dict[str, dict]]:
    group = {
        "format": "mxfp8-quantized",
        "input_activations": _quantization_args(dynamic=True, observer=None),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _quantization_args(dynamic=False, observer="memoryless_minmax"),
    }
    config = {
        "config_groups": {"group_0": group},
        "format": "mxfp8-quantized",
        "global_compression_ratio": None,
        "ignore": _with_head(choice.kept),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        # The version of the library whose form this is.
        "version": "0.15.0.1",
    }
    return config, {}


def _quantization_args(dynamic: bool, observer: str | None) -> dict:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": GROUP_SIZE,
        "num_bits": 8,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": "torch.uint8",
        "strategy": "group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }


FORMATS = {
    "sglang": Format("_scale_inv", _sglang_config),
    "modelopt": Format("_scale", _modelopt_config),
    "compressed-tensors": Format("_scale", _compressed_tensors_config),
}


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy the tokenizer and whatever else the checkpoint has, but no weights."""
    skipped = shutil.ignore_patterns(*WEIGHT_FILES, ".git", ".cache")
    shutil.copytree(source, target, ignore=skipped, dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
