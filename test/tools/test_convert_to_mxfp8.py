"""scripts/convert_to_mxfp8.py: what it writes, and what it refuses."""

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import convert_to_mxfp8
import pytest
import torch
from checkpoints import (
    make_synthetic_model,
    quantization_config,
    read_json,
    read_tensors,
    same_bytes,
    same_tensors,
)
from convert_to_mxfp8 import main
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
INDEX = "model.safetensors.index.json"
ATTENTION = "model.layers.0.self_attn"
DOWN = "model.layers.0.mlp.down_proj.weight"
QKV = [f"{ATTENTION}.{part}_proj" for part in "qkv"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "model"
    make_synthetic_model(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_text("weights in another format")
    (path / "assets").mkdir()
    (path / "assets" / "note.txt").write_text("kept")
    return path


@pytest.fixture
def source(model, tmp_path):
    """Makes a copy of the model, with these tensors and this config changed."""

    def copy(tensors=None, **config) -> Path:
        path = tmp_path / "in"
        shutil.copytree(model, path)
        changed = {**read_tensors(path), **(tensors or {})}
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(
            json.dumps({**read_json(path / "config.json"), **config})
        )
        return path

    return copy


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "model"
    assert main([str(model), str(output)]) == 0
    return output


def test_linears_are_what_the_quantizer_says(model, converted):
    from sglang.srt.layers.quantization.mxfp8.numerics import quantize

    before, after = read_tensors(model), read_tensors(converted)
    linears = [name for name in before if name.endswith("_proj.weight")]
    assert len(linears) == 2 * 7 and len(after) == len(before) + 2 * 7
    for name, tensor in before.items():
        if name in linears:
            tensor, scale = quantize(tensor)
            assert torch.equal(after[f"{name}_scale_inv"], scale)
        assert same_bytes(after[name], tensor)


def test_config_and_files(model, converted):
    config = read_json(converted / "config.json")
    assert config.pop("quantization_config") == {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": [],
    }
    assert config == read_json(model / "config.json")
    assert (converted / "tokenizer.json").read_text() == "{}"
    assert (converted / "assets" / "note.txt").read_text() == "kept"
    assert not (converted / "pytorch_model.bin").exists()
    assert not (converted / INDEX).exists()


def test_it_runs_itself_in_the_virtual_environment(model, converted, tmp_path):
    command = ["python3", convert_to_mxfp8.__file__, model, tmp_path / "o"]
    path = os.pathsep.join(("/usr/local/bin", "/usr/bin", "/bin"))
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(f"{tmp_path / 'o'}: 14 linears")
    assert same_tensors(tmp_path / "o", converted)


def test_large_weights_are_quantized_in_chunks_of_rows(
    model, converted, tmp_path, monkeypatch
):
    monkeypatch.setattr(convert_to_mxfp8, "CHUNK_ELEMENTS", 1000)
    assert main([str(model), str(tmp_path / "out")]) == 0
    assert same_tensors(tmp_path / "out", converted)


def test_shards_in_and_out(model, converted, tmp_path):
    from transformers import LlamaForCausalLM

    sharded = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(
        sharded, max_shard_size="300KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 3
    # Files outside the index are not part of the checkpoint.
    stray = {"stray.weight": torch.zeros(32, 32)}
    save_file(stray, sharded / "consolidated.safetensors")
    output = tmp_path / "out"
    assert main([str(sharded), str(output), "--max-shard-size", "270KB"]) == 0

    assert same_tensors(output, converted)
    index = json.loads((output / INDEX).read_text())
    total = 0
    for file in output.glob("*.safetensors"):
        content = load_file(file)
        assert {index["weight_map"][name] for name in content} == {file.name}
        size = sum(tensor.nbytes for tensor in content.values())
        assert size <= 270_000 or len(content) == 1
        total += size
    assert index["metadata"]["total_size"] == total


def test_ignored_linears_are_ones_that_sglang_skips(model, tmp_path):
    """Also a release that does not look for the parts of merged layers."""
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    output = tmp_path / "out"
    ignore = ["model.layers.0.self_attn.[qkv]_proj", "*.down_proj", "*.1.mlp.*"]
    patterns = [f"--ignore={pattern}" for pattern in ignore]
    assert main([str(model), str(output), *patterns]) == 0
    after = read_tensors(output)
    listed = quantization_config(output)["modules_to_not_convert"]
    for layer in range(2):
        for name, merged in (
            ("self_attn.q_proj", "self_attn.qkv_proj"),
            ("self_attn.v_proj", "self_attn.qkv_proj"),
            ("self_attn.o_proj", "self_attn.o_proj"),
            ("mlp.gate_proj", "mlp.gate_up_proj"),
            ("mlp.up_proj", "mlp.gate_up_proj"),
            ("mlp.down_proj", "mlp.down_proj"),
        ):
            weight = f"model.layers.{layer}.{name}.weight"
            kept = after[weight].dtype == torch.bfloat16
            assert kept == (f"{weight}_scale_inv" not in after)
            assert kept == is_layer_skipped(f"model.layers.{layer}.{merged}", listed)
    assert f"{ATTENTION}.qkv_proj" in listed


def assert_refused(capsys, directory: Path, arguments, words) -> None:
    """Refused with 2 and one line that has `words`, and nothing is left in `directory`."""
    before = sorted(directory.rglob("*"))
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and not line.startswith("Converting")]
    assert len(lines) == 1 and lines[0].startswith("convert_to_mxfp8: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert sorted(directory.rglob("*")) == before


def case(*words: str, tensors=None, arguments="", **config) -> tuple:
    return tensors or {}, config, arguments, words


def down(*shape: int) -> dict:
    return {DOWN: torch.zeros(shape, dtype=torch.bfloat16)}


UP = "model.layers.0.mlp.up_proj"
QUANTIZED = "already quantized"


@pytest.mark.parametrize(
    "tensors, config, arguments, words",
    [
        case("K = 528", "--ignore '*.down_proj'", DOWN, tensors=down(256, 528)),
        case("[256, 0]", "fetch", DOWN, tensors=down(256, 0)),
        case(QKV[1], "q_proj", "qkv_proj", arguments="--ignore=*.k_proj"),
        case(UP, "gate_proj, up_proj", arguments=f"--ignore={UP} --format=modelopt"),
        case("'*.qproj'", "no linear", arguments="--ignore=*.qproj"),
        case("no linear is left", arguments="--ignore=*"),
        case(DOWN, QUANTIZED, tensors={DOWN: torch.zeros(256, 512).to(FP8)}),
        case(QUANTIZED, tensors={f"{DOWN}_scale_inv": torch.ones(256, 16)}),
        case(DOWN, "NaN", tensors={DOWN: torch.full((256, 512), torch.nan)}),
        case("no CUDA device", arguments="--device=cuda"),
        case("say 500MB or 2GB", arguments="--max-shard-size=GB"),
        case("sglang cannot serve", "Nobodys", architectures=["NobodysForCausalLM"]),
        case(QUANTIZED, "fp8", quantization_config={"quant_method": "fp8"}),
    ],
)
def test_refusals(tensors, config, arguments, words, source, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    path = source(tensors, **config)
    given = [path, tmp_path / "out", *arguments.split()]
    assert_refused(capsys, tmp_path, given, words)


@pytest.mark.parametrize("form", sorted(convert_to_mxfp8.SCALE_SUFFIXES))
def test_what_it_wrote_is_refused_as_input(form, model, tmp_path, capsys):
    output = tmp_path / "out"
    assert main([str(model), str(output), f"--format={form}"]) == 0
    again = [output, tmp_path / "again"]
    assert_refused(capsys, tmp_path, again, ["already quantized", "config.json"])
    (output / "config.json").write_text("{}")
    if form == "modelopt":
        assert_refused(capsys, tmp_path, again, ["hf_quant_config.json"])
        (output / "hf_quant_config.json").unlink()
    assert_refused(capsys, tmp_path, again, ["model.layers.", "already quantized"])


def test_incomplete_checkpoints(source, tmp_path, capsys):
    path = source()
    arguments = [path, tmp_path / "out"]
    file = path / "model.safetensors"
    for weight_map, words in (
        ({DOWN: "model-00001-of-00002.safetensors"}, "2.safetensors is missing"),
        ({"other.weight": file.name}, f"{file.name} lacks other.weight"),
        (None, "is not JSON"),
    ):
        text = "{" if weight_map is None else json.dumps({"weight_map": weight_map})
        (path / INDEX).write_text(text)
        assert_refused(capsys, tmp_path, arguments, [words])
    (path / INDEX).unlink()
    file.write_bytes(file.read_bytes()[:-7])
    assert_refused(capsys, tmp_path, arguments, [f"{file.name} is damaged"])
    file.rename(path / "model.pt")
    assert_refused(capsys, tmp_path, arguments, ["has neither", "save_pretrained"])
    (path / "config.json").unlink()
    assert_refused(capsys, tmp_path, arguments, ["has no config.json"])


def test_paths(model, source, tmp_path, capsys):
    path, output = source(), tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    arguments = [path, output]
    assert_refused(capsys, tmp_path, arguments, ["is not empty", "--overwrite"])
    assert_refused(capsys, tmp_path, [path, path, "--overwrite"], ["inside"])
    assert_refused(capsys, tmp_path, [path, path / "out"], ["inside one another"])
    name = os.fsdecode(b"caf\xe9")
    for paths in ([tmp_path / name, output], [path, tmp_path / name]):
        assert_refused(capsys, tmp_path, paths, ["\\udce9", "UTF-8"])

    assert main([str(path), str(output), "--overwrite"]) == 0
    assert quantization_config(output)["quant_method"] == "mxfp8"
    assert not (output / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("shard_size", ["2GB", "300KB"])
def test_a_full_disk(shard_size, model, tmp_path, capsys):
    """As the kernel says it: no file may become larger than this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        arguments = [model, tmp_path / "out", f"--max-shard-size={shard_size}"]
        assert_refused(capsys, tmp_path, arguments, ["out was not written", "large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, "SIGTERM"])
def test_interrupted_run_leaves_what_was_there(
    interruption, model, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")

    def interrupt(*args, **kwargs):
        if interruption == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_to_mxfp8, "write_json", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([str(model), str(output), "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "mine").read_text() == "precious"
