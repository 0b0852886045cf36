"""convert_to_mxfp8.py --format against the libraries that write and read these formats.

compressed_tensors is one of the server's own requirements. ModelOpt is not: its part
runs where nvidia-modelopt is installed, and what it wrote once is compared everywhere.
"""

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from convert_to_mxfp8 import main
from make_synthetic_model import make_synthetic_model
from safetensors.torch import load_file
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


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def quantization_config(path: Path) -> dict:
    return read_json(path / "config.json")["quantization_config"]


def tensors(path: Path) -> dict:
    return load_file(path / "model.safetensors")


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


def dequantized(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 [N, K] times 2^(byte - 127) of uint8 [N, K/32], in fp64."""
    factor = torch.exp2(scale.double() - 127).repeat_interleave(32, dim=1)
    return values.double() * factor


@pytest.mark.parametrize("arguments", [[], [f"--ignore={p}" for p in IGNORED]])
@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_every_format_has_the_same_bytes(convert, form, arguments):
    ours = tensors(convert("--format=sglang", *arguments))
    theirs = tensors(convert(f"--format={form}", *arguments))
    assert any(name.endswith("_scale_inv") for name in ours)
    renamed = {name.replace("_scale_inv", "_scale"): t for name, t in ours.items()}
    assert theirs.keys() == renamed.keys()
    assert all(same_bytes(theirs[name], renamed[name]) for name in theirs)


def test_lists_have_the_checkpoints_names_and_the_head(model, convert, tmp_path):
    tied = tmp_path / "tied"
    make_synthetic_model(tied)
    assert "lm_head.weight" not in tensors(tied)
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


def test_compressed_tensors_reads_the_config_as_its_preset(convert):
    path = convert(*mixed("compressed-tensors"))
    config = QuantizationConfig.model_validate(quantization_config(path))
    (scheme,) = config.config_groups.values()
    preset = preset_name_to_scheme("MXFP8", ["Linear"])
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(scheme, part), getattr(preset, part)
        # What the library itself writes has no type for zero points: there are none.
        assert ours == theirs.model_copy(update={"zp_dtype": ours.zp_dtype})
    assert scheme.targets == preset.targets
    assert config.quantization_status == QuantizationStatus.COMPRESSED
    assert not config.requires_calibration_data()


def test_tensors_are_those_of_compressed_tensors(model, compressed, convert):
    """Its scale is twice ours where amax is 448 * 2^n, and the same everywhere else."""
    source = tensors(model)
    ours, theirs = tensors(convert("--format=compressed-tensors")), tensors(compressed)
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


def test_compressed_tensors_decompresses_to_the_same_weights(convert):
    """Its own decompression is exact: a bf16 holds an e4m3 value times a power of two."""
    path = convert(*mixed("compressed-tensors"))
    content = tensors(path)
    scheme = preset_name_to_scheme("MXFP8", ["Linear"])
    form = quantization_config(path)["format"]
    compressor = BaseCompressor.get_value_from_registry(form)
    linears = [name for name in content if f"{name}_scale" in content]
    assert len(linears) == 14 - len(KEPT)
    for name in linears:
        weight, scale = content[name], content[f"{name}_scale"]
        state = compressor.decompress({"weight": weight, "weight_scale": scale}, scheme)
        assert torch.equal(state["weight"].double(), dequantized(weight, scale))


def test_transformers_reads_it_through_compressed_tensors(convert):
    path = convert(*mixed("compressed-tensors"))
    module = AutoModelForCausalLM.from_pretrained(
        path,
        dtype="auto",
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    content, loaded = tensors(path), module.state_dict()
    for name, tensor in content.items():
        if name.endswith("_scale"):
            continue
        if f"{name}_scale" in content:
            tensor = dequantized(tensor, content[f"{name}_scale"])
        assert torch.equal(loaded[name].double(), tensor.double()), name


# --- ModelOpt ---

# What export_hf_checkpoint of nvidia-modelopt 0.47.0 wrote for a Llama of two layers
# quantized with MXFP8_DEFAULT_CFG and with `MODELOPT_OFF` below switched off.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
MODELOPT_LIST = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn*",
    "model.layers.1.mlp.down_proj",
]
MODELOPT_CONFIG = {
    "ignore": MODELOPT_LIST,
    "quant_algo": "MXFP8",
    "producer": PRODUCER,
    "quant_method": "modelopt",
}
MODELOPT_SIDECAR = {
    "producer": PRODUCER,
    "quantization": {
        "quant_algo": "MXFP8",
        "kv_cache_quant_algo": None,
        "group_size": 32,
        "exclude_modules": MODELOPT_LIST,
    },
}
MODELOPT_OFF = ["*layers.0.self_attn*", "*layers.1.mlp.down_proj*"]
# ModelOpt patches transformers' classes: it gets a process of its own.
MODELOPT_SCRIPT = """
import copy, json, sys
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

source, output, off = sys.argv[1:]
config = copy.deepcopy(mtq.MXFP8_DEFAULT_CFG)
for name in json.loads(off):
    config["quant_cfg"].append({"quantizer_name": name, "enable": False})
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
export_hf_checkpoint(mtq.quantize(model, config), export_dir=output)
"""


def expand(listed: list[str], source: Path) -> set[str]:
    """The modules that a list of names and globs names; every entry names some."""
    modules = {name.removesuffix(".weight") for name in tensors(source)}
    found = [{m for m in modules if fnmatchcase(m, entry)} for entry in listed]
    assert all(found), listed
    return set().union(*found)


def with_modules(settings: dict, key: str, source: Path) -> dict:
    """`settings` with the list under `key` expanded to the modules that it names."""
    return {**settings, key: expand(settings[key], source)}


def test_configs_are_what_modelopt_wrote(model, convert):
    ours = convert(*mixed("modelopt"))
    assert with_modules(quantization_config(ours), "ignore", model) == with_modules(
        MODELOPT_CONFIG, "ignore", model
    )
    sidecar = read_json(ours / "hf_quant_config.json")
    quantization = with_modules(sidecar["quantization"], "exclude_modules", model)
    assert {**sidecar, "quantization": quantization} == {
        "producer": PRODUCER,
        "quantization": with_modules(
            MODELOPT_SIDECAR["quantization"], "exclude_modules", model
        ),
    }


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    """The model as ModelOpt itself quantizes and exports it."""
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    path = tmp_path_factory.mktemp("modelopt") / "model"
    command = [sys.executable, "-c", MODELOPT_SCRIPT, model, path]
    subprocess.run(
        [*command, json.dumps(MODELOPT_OFF)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    return path


def test_modelopt_still_writes_what_it_wrote(exported):
    assert quantization_config(exported) == MODELOPT_CONFIG
    assert read_json(exported / "hf_quant_config.json") == MODELOPT_SIDECAR


def test_tensors_are_those_of_modelopt(exported, convert):
    ours, theirs = tensors(convert(*mixed("modelopt"))), tensors(exported)
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in theirs)
