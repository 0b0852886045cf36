"""convert_to_mxfp8.py --format against what others write and read in these formats:
compressed_tensors, which the server needs too, and ModelOpt, as it wrote once
(benchmark/results/mxfp8_writers.md)."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from checkpoints import (
    make_synthetic_model,
    quantization_config,
    read_json,
    read_tensors,
    same_bytes,
)
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from convert_to_mxfp8 import main
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

# Kept as they are in the `mixed` checkpoints: a whole block, and one linear.
IGNORED = ["model.layers.0.self_attn.*", "model.layers.1.mlp.down_proj"]
KEPT = [f"model.layers.0.self_attn.{name}_proj" for name in "koqv"] + IGNORED[1:]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "model"
    make_synthetic_model(path, tie_word_embeddings=False)
    return path


@pytest.fixture(scope="module")
def convert(model, tmp_path_factory):
    """Convert the model once per list of arguments; gives the directory."""
    outputs = {}

    def run(*arguments: str) -> Path:
        if arguments not in outputs:
            output = tmp_path_factory.mktemp("converted") / "model"
            assert main([str(model), str(output), *arguments]) == 0
            outputs[arguments] = output
        return outputs[arguments]

    return run


def mixed(form: str) -> list[str]:
    return [f"--format={form}", *(f"--ignore={pattern}" for pattern in IGNORED)]


def dequantized(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 [N, K] times 2^(byte - 127) of uint8 [N, K/32], in fp64."""
    factor = torch.exp2(scale.double() - 127).repeat_interleave(32, dim=1)
    return values.double() * factor


@pytest.mark.parametrize("arguments", [[], [f"--ignore={p}" for p in IGNORED]])
@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_every_format_has_the_same_bytes(convert, form, arguments):
    ours = read_tensors(convert("--format=sglang", *arguments))
    theirs = read_tensors(convert(f"--format={form}", *arguments))
    assert any(name.endswith("_scale_inv") for name in ours)
    renamed = {name.replace("_scale_inv", "_scale"): t for name, t in ours.items()}
    assert theirs.keys() == renamed.keys()
    assert all(same_bytes(theirs[name], renamed[name]) for name in theirs)


def test_lists_have_the_checkpoints_names_and_the_head(model, convert, tmp_path):
    tied = tmp_path / "tied"
    make_synthetic_model(tied)
    assert "lm_head.weight" not in read_tensors(tied)
    for form in ("modelopt", "compressed-tensors"):
        listed = quantization_config(convert(*mixed(form)))["ignore"]
        assert listed == sorted([*KEPT, "lm_head", "model.embed_tokens"])
        output = tmp_path / form
        assert main([str(tied), str(output), f"--format={form}"]) == 0
        listed = quantization_config(output)["ignore"]
        assert listed == ["lm_head", "model.embed_tokens"]


# --- compressed_tensors ---


@pytest.fixture(scope="module")
def compressed(model, tmp_path_factory) -> Path:
    """The model as compressed_tensors itself compresses and saves it, by its preset."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    preset = QuantizationConfig(config_groups={"MXFP8": ["Linear"]}, ignore=["lm_head"])
    apply_quantization_config(module, preset)
    for linear in module.modules():
        if hasattr(linear, "weight_scale"):
            groups = linear.weight.detach().unflatten(1, (-1, 32))
            scale, _ = calculate_qparams(
                groups.amin(-1), groups.amax(-1), linear.quantization_scheme.weights
            )
            linear.weight_scale.data.copy_(scale)
            linear.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(module)
    compressor.compress_model(module)
    path = tmp_path_factory.mktemp("compressed_tensors") / "model"
    module.save_pretrained(path)
    compressor.update_config(path)
    return path


def test_config_is_what_compressed_tensors_writes(compressed, convert):
    theirs = quantization_config(compressed)
    ours = quantization_config(convert("--format=compressed-tensors"))
    assert ours.pop("ignore") == [*theirs.pop("ignore"), "model.embed_tokens"]
    assert ours == theirs


def test_tensors_are_those_of_compressed_tensors(model, compressed, convert):
    """Its scale is twice ours where amax is 448 * 2^n, and the same everywhere else."""
    source = read_tensors(model)
    ours, theirs = read_tensors(convert("--format=compressed-tensors")), read_tensors(
        compressed
    )
    assert ours.keys() == theirs.keys()
    doubled = 0
    for name, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[name].dtype, ours[name].shape)
        if f"{name}_scale" not in theirs:
            assert name.endswith("_scale") or same_bytes(tensor, ours[name])
            continue
        amax = source[name].float().unflatten(1, (-1, 32)).abs().amax(-1)
        edge = torch.frexp(amax / 448).mantissa == 0.5
        scale, our_scale = theirs[f"{name}_scale"], ours[f"{name}_scale"]
        assert torch.equal(scale.int(), our_scale.int() + edge)
        same = ~edge.repeat_interleave(32, dim=1)
        assert torch.equal(tensor.float()[same], ours[name].float()[same])
        doubled += int(edge.sum())
    assert doubled > 0


def test_transformers_reads_it_through_compressed_tensors(convert):
    path = convert(*mixed("compressed-tensors"))
    module = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    content, loaded = read_tensors(path), module.state_dict()
    for name, tensor in content.items():
        if name.endswith("_scale"):
            continue
        if f"{name}_scale" in content:
            tensor = dequantized(tensor, content[f"{name}_scale"])
        assert torch.equal(loaded[name].double(), tensor.double()), name


# What export_hf_checkpoint of nvidia-modelopt 0.47.0 wrote for such a Llama, quantized with
# MXFP8_DEFAULT_CFG and with what IGNORED names switched off.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
MODELOPT_LIST = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn*",
    "model.layers.1.mlp.down_proj",
]


def test_configs_are_what_modelopt_wrote(model, convert):
    path = convert(*mixed("modelopt"))
    config = quantization_config(path)
    listed = config.pop("ignore")
    method = {"quant_algo": "MXFP8", "quant_method": "modelopt"}
    assert config == {**method, "producer": PRODUCER}
    quantization = {"quant_algo": "MXFP8", "kv_cache_quant_algo": None}
    quantization |= {"group_size": 32, "exclude_modules": listed}
    sidecar = {"producer": PRODUCER, "quantization": quantization}
    assert read_json(path / "hf_quant_config.json") == sidecar
    # Its list has globs, ours the names of the modules.
    modules = {name.removesuffix(".weight") for name in read_tensors(model)}
    wrote = [{m for m in modules if fnmatchcase(m, entry)} for entry in MODELOPT_LIST]
    assert set(listed) == set().union(*wrote)
