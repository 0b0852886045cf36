"""Converts a checkpoint to MXFP8, as the model that sglang builds for it says.

Imports sglang, which takes a while and, without a CUDA driver, stand-ins for its kernels.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Sequence, Set, Tuple
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from staging import staged_directory
from tqdm import tqdm

if not torch.cuda.is_available():
    sys.path.insert(0, str(Path(__file__).resolve().parent / "cpu_stand_ins"))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

# On a CPU it can be imported; elsewhere it asks for kernels when it is built.
import sglang.srt.layers.rotary_embedding  # noqa: F401
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.layers.quantization.mxfp8.finite import refuse_non_finite
from sglang.srt.layers.quantization.mxfp8.formats import LayerList
from sglang.srt.layers.quantization.mxfp8.headers import Header, read_headers
from sglang.srt.layers.quantization.mxfp8.lifecycle import update_check_of
from sglang.srt.layers.quantization.mxfp8.meta import build_on_meta
from sglang.srt.layers.quantization.mxfp8.names import Layer, ask_model, module_of
from sglang.srt.layers.quantization.mxfp8.numerics import GROUP_SIZE, quantize
from sglang.srt.layers.quantization.mxfp8.weights import SCALE, WEIGHT, row_slabs
from sglang.srt.model_loader import loader
from sglang.srt.model_loader.weight_utils import filter_duplicate_safetensors_files
from sglang.test import mxfp8_utils

with mock.patch("sglang.srt.utils.is_cpu", lambda: False):
    import sglang.srt.models.registry  # noqa: F401

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
NOT_COPIED = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", ".*")
# Small, and they lose more than the text does.
TOWERS = ("*visual*", "*vision*", "*audio*")
QUANTIZATION = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, GROUP_SIZE],
    "scale_fmt": "ue8m0",
}
# Experts are one layer, and one entry of the list.
_EXPERT = re.compile(r"(?<=\.experts)\..*")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Headers = Dict[str, Header]


def convert(source: Path, output: Path, ignore: Sequence[str]) -> str:
    """Put the converted checkpoint at `output`, all or nothing; returns what was done.

    Raises ValueError for what cannot be converted, before writing but for a weight that
    is not finite; OSError and SafetensorError for files.
    """
    config = _read_config(source)
    files = _weight_files(source)
    headers = dict(read_headers(files, use_safetensors=True))
    _refuse_quantized(source, config, headers)
    with _asking_sglang(source):
        shapes = {name: header.shape for name, header in headers.items()}
        layers, _ = ask_model(*_how_to_build(source, QUANTIZATION), shapes)
    converted, kept = choose(layers, headers, ignore)
    quantization = {**QUANTIZATION, "modules_to_not_convert": kept}
    with _asking_sglang(source):
        configs = _how_to_build(source, quantization)
        check = update_check_of(configs[1], build_on_meta(*configs))
        to_mxfp8 = partial(_to_mxfp8, converted, _quantized_header)
        check.files(files, use_safetensors=True, rename=to_mxfp8)
    with staged_directory(output) as staging:
        skipped = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(source, staging, ignore=skipped, dirs_exist_ok=True)
        weight_map, size = {}, 0
        for file in tqdm(files, desc="Converting", unit="file"):
            with safe_open(file, framework="pt") as source_file:
                tensors = ((n, source_file.get_tensor(n)) for n in source_file.keys())
                content = dict(_to_mxfp8(converted, _quantized, tensors))
            save_file(content, staging / Path(file).name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(content, Path(file).name)
            size += sum(tensor.nbytes for tensor in content.values())
        if (source / INDEX).exists():
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (staging / INDEX).write_text(json.dumps(index, indent=2))
        config["quantization_config"] = quantization
        (staging / CONFIG).write_text(json.dumps(config, indent=2))
    return (
        f"{output}: {len(converted)} linears in MXFP8, {len(headers) - len(converted)} "
        f"tensors as they were, {size / 1e6:.0f} MB"
    )


def choose(
    layers: Sequence[Layer], headers: Headers, ignore: Sequence[str]
) -> Tuple[Set[str], List[str]]:
    """Of the model's layers, the tensors that become MXFP8; the list of what does not.

    Raises ValueError for a pattern without a match, for a layer of sglang's of which only
    a part is to be kept, and where nothing is left.
    """
    matrices = {name for name, header in headers.items() if len(header.shape) > 1}
    for pattern in ignore:
        others = LayerList([f"glob:{pattern}"])
        if all(others.has(module_of(name)) for name in matrices):
            example = module_of(min(matrices))
            raise ValueError(f"--ignore {pattern!r} matches none, such as {example!r}")
    wanted = LayerList(f"glob:{pattern}" for pattern in [*ignore, *TOWERS])
    converted, converted_names, kept_names = set(), set(), set()
    for layer in layers:
        weights = {name: headers[name] for name in layer.tensors & matrices}
        modules = sorted(map(module_of, weights))
        if weights and wanted.has_layer(layer.path, modules) and _fits(layer, weights):
            converted.update(weights)
            converted_names.update([layer.path, layer.prefix, *modules])
        elif weights:
            kept_names.update([layer.path, layer.prefix])
    if not converted:
        raise ValueError("no linear is left to convert, of those that can be in MXFP8")
    # A draft model in the same files asks for more than these layers.
    kept_names.update(map(module_of, matrices - converted))
    # sglang skips every layer whose name contains an entry.
    skippable = "\n".join(converted_names)
    listed = {_EXPERT.sub("", name) for name in kept_names if name not in skippable}
    return converted, sorted(listed)


def _fits(layer: Layer, weights: Headers) -> bool:
    """Whether these are [N, K] with whole groups, and loaded as they are."""
    return not layer.rearranged & weights.keys() and all(
        name.endswith(f".{WEIGHT}")
        and len(header.shape) == 2
        and header.shape[1] % GROUP_SIZE == 0
        and header.dtype.is_floating_point
        for name, header in weights.items()
    )


def _read_config(source: Path) -> dict:
    try:
        return json.loads((source / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{source / CONFIG} is not JSON: {error}") from error


def _weight_files(source: Path) -> List[str]:
    files = sorted(map(str, source.glob("*.safetensors")))
    try:
        files = filter_duplicate_safetensors_files(files, str(source), INDEX)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{source / INDEX} is no index: {error!r}") from error
    if not files:
        raise ValueError(f"{source} has no safetensors: save_pretrained() it as such")
    return files


def _refuse_quantized(source: Path, config: dict, headers: Headers) -> None:
    signs = [*filter(config.get, ("quantization_config", "compression_config"))]
    signs += [path.name for path in source.glob("hf_quant_config.json")]
    signs += [name for name, header in headers.items() if header.dtype in FP8]
    signs += [name for name in headers if "weight_scale" in name]
    if signs:
        raise ValueError(f"{source} is already quantized: it has {signs[0]}")


@contextlib.contextmanager
def _asking_sglang(source: Path) -> Iterator[None]:
    try:
        with mxfp8_utils.as_on_a_gpu():
            yield
    except Exception as error:  # whatever a config, a model's code or its loader raises
        why = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"sglang cannot serve {source} in MXFP8: {why}") from error


def _how_to_build(source: Path, quantization: dict) -> Tuple:
    """What loaders build a model with: a function, and the configs that it takes."""
    mxfp8_utils.init_single_process_parallel_state()
    config = mxfp8_utils.server_model_config(
        str(source),
        device="cuda" if torch.cuda.is_available() else "cpu",
        attention_backend="fa3",
        json_model_override_args=json.dumps({"quantization_config": quantization}),
    )
    load_config = LoadConfig()
    quant_config = loader._get_quantization_config(config, load_config)
    return loader._initialize_model, config, load_config, quant_config


def _to_mxfp8(converted: Set[str], convert: Callable, named: Iterable) -> Iterator:
    """The result's tensors, or headers, for the source's."""
    for name, tensor in named:
        if name in converted:
            tensor, scale = convert(name, tensor)
            yield name.removesuffix(WEIGHT) + SCALE, scale
        yield name, tensor


def _quantized_header(name: str, header: Header) -> Tuple[Header, Header]:
    n, k = header.shape
    scale = Header(torch.uint8, (n, k // GROUP_SIZE))
    return Header(torch.float8_e4m3fn, (n, k)), scale


def _quantized(name: str, weight: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [N, K] and E8M0 uint8 [N, K/32] of floats [N, K], some rows at a time."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(len(weight), weight.shape[1] // GROUP_SIZE, dtype=torch.uint8)
    for rows in row_slabs(weight):
        piece = weight[rows].float()
        refuse_non_finite([(name, piece)], quantizes=True)
        values[rows], scale[rows] = quantize(piece)
    return values, scale
