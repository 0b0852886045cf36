"""scripts/convert_to_mxfp8.py: what it writes, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import convert_to_mxfp8
import mxfp8_conversion
import pytest
import torch
from checkpoints import read_config, read_tensors, same_tensors, save_tiny_llama, write
from convert_to_mxfp8 import main
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sglang.srt.layers.quantization.mxfp8 import weights
from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.test.mxfp8_utils import TINY_LLAMA

INDEX = "model.safetensors.index.json"
UP, DOWN = (f"model.layers.0.mlp.{part}_proj" for part in ("up", "down"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_llama(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_text("weights in another format")
    (path / "assets").mkdir()
    (path / "assets" / "note.txt").write_text("kept")
    return path


def run(*arguments) -> subprocess.CompletedProcess:
    """As a user runs it, by a Python without packages."""
    command = ["python3", convert_to_mxfp8.__file__, *arguments]
    env = {"PATH": os.pathsep.join(("/usr/local/bin", "/usr/bin", "/bin"))}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "model"
    done = run(model, output)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith(f"{output}: 14 linears in MXFP8, 6 tensors as they were, ")
    return output


def test_what_is_written(model, converted):
    expected = {}
    for name, tensor in read_tensors(model).items():
        expected[name] = tensor
        if name.endswith("_proj.weight"):
            expected[name], expected[f"{name}_scale_inv"] = quantize(tensor)
    assert len(expected) == 20 + 14
    assert same_tensors(read_tensors(converted), expected)
    config = read_config(converted)
    kept = {"modules_to_not_convert": ["model.embed_tokens"]}
    quantization = {**TINY_LLAMA["quantization_config"], **kept}
    assert config.pop("quantization_config") == quantization
    assert config == read_config(model)
    copied = {"assets", "config.json", "generation_config.json", "tokenizer.json"}
    names = {path.name for path in converted.iterdir()}
    assert names == copied | {"model.safetensors"}
    assert (converted / "assets" / "note.txt").read_text() == "kept"


def test_files_keep_their_names(model, converted, tmp_path, monkeypatch):
    """Of doubles, which are quantized some rows at a time."""
    sharded, output = tmp_path / "sharded", tmp_path / "out"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    loaded.save_pretrained(sharded, max_shard_size="1MB")
    shutil.copy(model / "config.json", sharded)  # served in bf16
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    # Files outside the index are not part of the checkpoint.
    stray = {"stray.weight": torch.zeros(32, 32)}
    save_file(stray, sharded / "consolidated.safetensors")
    monkeypatch.setattr(weights, "MAX_TEMPORARY_BYTES", 100_000)
    assert main([str(sharded), str(output)]) == 0

    expected = read_tensors(converted)
    wide = {n: t.double() for n, t in expected.items() if t.dtype == torch.bfloat16}
    assert same_tensors(read_tensors(output), expected | wide)
    index = json.loads((output / INDEX).read_text())
    contents = {name: load_file(output / name) for name in names}
    places = {tensor: name for name, content in contents.items() for tensor in content}
    assert index["weight_map"] == places and len(names) > 3
    total = sum(tensor.nbytes for tensor in read_tensors(output).values())
    assert index["metadata"]["total_size"] == total


def test_ignored_linears_are_ones_that_sglang_skips(model, tmp_path):
    """Also a release that does not look for the parts of merged layers."""
    output = tmp_path / "out"
    ignore = ["model.layers.0.self_attn.[qkv]_proj", "*.down_proj", "*.1.mlp.*"]
    patterns = [f"--ignore={pattern}" for pattern in ignore]
    assert main([str(model), str(output), *patterns]) == 0
    after = read_tensors(output)
    listed = read_config(output)["quantization_config"]["modules_to_not_convert"]
    merged = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    merged |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
    linears = [name for name in after if name.endswith("_proj.weight")]
    for name in linears:
        layer, part, _ = name.rsplit(".", 2)
        kept = f"{name}_scale_inv" not in after
        assert kept == (after[name].dtype == torch.bfloat16)
        assert kept == is_layer_skipped(f"{layer}.{merged.get(part, part)}", listed)
    assert len(linears) == 14


def with_down_proj(tensor: torch.Tensor):
    def change(path: Path) -> None:
        write(path, read_tensors(path) | {f"{DOWN}.weight": tensor}, read_config(path))

    return change


def with_text(name: str, text: str):
    return lambda path: (path / name).write_text(text) and None


def with_config(**changes):
    config = {**TINY_LLAMA, **changes}
    return with_text("config.json", json.dumps(config))


def ignoring(pattern: str):
    return lambda path: [f"--ignore={pattern}"]


@pytest.mark.parametrize(
    "change, words",
    [
        (with_down_proj(torch.zeros(512, 0)), "down_proj.weight|does not fill"),
        (with_down_proj(torch.full((512, 544), torch.nan)), "down_proj.weight|NaN"),
        (with_down_proj(torch.zeros(1).to(torch.float8_e4m3fn)), f"already|{DOWN}"),
        (with_config(), "already|quantization_config"),
        (with_text("hf_quant_config.json", ""), "already|hf_quant"),
        (
            with_config(quantization_config={}, architectures=["NobodysForCausalLM"]),
            "cannot serve|Nobodys",
        ),
        (with_text(INDEX, "{"), f"{INDEX} is no index"),
        (with_text(INDEX, '{"weight_map": {"a": "b"}}'), "no safetensors"),
        (with_text("model.safetensors", ""), "cannot be read"),
        (with_text("config.json", "{"), "config.json is not JSON"),
        (ignoring("*.k_proj"), "qkv_proj is one layer|self_attn.k_proj"),
        (ignoring(UP), f"gate_up_proj is one layer|{UP}"),
        (ignoring("*.qproj"), "'*.qproj' matches none|model."),
        (ignoring("*"), "no linear is left"),
        (lambda path: path.with_name("out").mkdir(), "is there already"),
    ],
)
def test_refused(change, words, model, tmp_path, capsys):
    """With 2 and one line that has `words`, and nothing is left beside the checkpoint."""
    path = tmp_path / "in"
    shutil.copytree(model, path)
    flags = change(path) or []
    before = sorted(tmp_path.rglob("*"))
    assert main([str(path), str(tmp_path / "out"), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if line and not line.startswith("Converting")]
    assert line.startswith("convert_to_mxfp8: ")
    assert all(word in line for word in words.split("|")), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refusal_is_one_line(model):
    done = run(model, model / "out")
    assert (done.returncode, done.stdout) == (2, "")
    told = f"convert_to_mxfp8: {model}/out lies inside {model}: choose another output\n"
    assert done.stderr == told


def test_a_k_that_is_no_multiple_of_32_stays(tmp_path):
    save_tiny_llama(tmp_path / "in", intermediate_size=48)
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    kept = read_config(tmp_path / "out")["quantization_config"]
    assert DOWN in kept["modules_to_not_convert"]
    assert f"{DOWN}.weight_scale_inv" not in read_tensors(tmp_path / "out")


def test_an_interrupted_run_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(mxfp8_conversion, "save_file", interrupt)
    with pytest.raises(SystemExit):
        main([str(model), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
