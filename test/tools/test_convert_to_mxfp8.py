"""scripts/convert_to_mxfp8.py: what it writes, and what it refuses."""

import json
import os
import signal
from pathlib import Path

import convert_to_mxfp8
import pytest
import torch
from convert_to_mxfp8 import Tensor, _plan_shards, main
from hypothesis import given
from hypothesis import strategies as st
from make_synthetic_model import make_synthetic_model
from safetensors.torch import load_file, save_file
from staging import staged_directory

LAYER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"


def read_checkpoint(path: Path) -> dict:
    tensors = {}
    for file in path.glob("*.safetensors"):
        content = load_file(file)
        assert not content.keys() & tensors.keys()
        tensors.update(content)
    return tensors


def read_config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def write_checkpoint(path: Path, config: dict | None = None, **shapes) -> Path:
    """A checkpoint of one file; names are given with __ for dots."""
    path.mkdir()
    tensors = {
        name.replace("__", "."): (
            torch.randn(shape).bfloat16() if isinstance(shape, tuple) else shape
        )
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def weights(**shapes) -> dict:
    return {f"model__layers__0__{name}__weight": s for name, s in shapes.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "model"
    make_synthetic_model(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_text("weights in another format")
    (path / "assets").mkdir()
    (path / "assets" / "note.txt").write_text("kept")
    return path


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "model"
    assert main([str(model), str(output)]) == 0
    return output


def test_linears_are_what_the_quantizer_says(model, converted):
    from sglang.srt.layers.quantization.mxfp8_emulation import quantize

    before, after = read_checkpoint(model), read_checkpoint(converted)
    linears = [name for name in before if name.endswith("_proj.weight")]
    assert len(linears) == 2 * 7
    for name in linears:
        values, scale = quantize(before[name])
        assert after[name].dtype == torch.float8_e4m3fn
        assert after[f"{name}_scale_inv"].dtype == torch.uint8
        assert torch.equal(after[name].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(after[f"{name}_scale_inv"], scale)


def test_everything_else_is_untouched(model, converted):
    before, after = read_checkpoint(model), read_checkpoint(converted)
    others = [name for name in before if not name.endswith("_proj.weight")]
    assert "model.embed_tokens.weight" in others and "model.norm.weight" in others
    for name in others:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert len(after) == len(before) + 2 * 7


def test_config_and_files(model, converted):
    config = read_config(converted)
    assert config.pop("quantization_config") == {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": [],
    }
    assert config == read_config(model)
    assert (converted / "tokenizer.json").read_text() == "{}"
    assert (converted / "assets" / "note.txt").read_text() == "kept"
    assert not (converted / "pytorch_model.bin").exists()
    assert not (converted / "model.safetensors.index.json").exists()


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
    save_file(
        {"stray.weight": torch.zeros(32, 32)}, sharded / "consolidated.safetensors"
    )
    output = tmp_path / "out"
    assert main([str(sharded), str(output), "--max-shard-size", "270KB"]) == 0

    assert same_tensors(output, converted)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    total = 0
    for file in output.glob("*.safetensors"):
        content = load_file(file)
        assert {index["weight_map"][name] for name in content} == {file.name}
        size = sum(tensor.nbytes for tensor in content.values())
        assert size <= 270_000 or len(content) == 1
        total += size
    assert index["metadata"]["total_size"] == total


def same_tensors(left: Path, right: Path) -> bool:
    left, right = read_checkpoint(left), read_checkpoint(right)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
    )


def test_ignored_linears_are_ones_that_sglang_skips(model, tmp_path):
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    output = tmp_path / "out"
    ignore = ["model.layers.0.self_attn.[qkv]_proj", "*.down_proj", "*.1.mlp.*"]
    patterns = [part for pattern in ignore for part in ("--ignore", pattern)]
    assert main([str(model), str(output), *patterns]) == 0

    after = read_checkpoint(output)
    listed = read_config(output)["quantization_config"]["modules_to_not_convert"]
    for layer in range(2):
        for name, merged in (
            ("self_attn.q_proj", "self_attn.qkv_proj"),
            ("self_attn.v_proj", "self_attn.qkv_proj"),
            ("self_attn.o_proj", "self_attn.o_proj"),
            ("mlp.gate_proj", "mlp.gate_up_proj"),
            ("mlp.up_proj", "mlp.gate_up_proj"),
            ("mlp.down_proj", "mlp.down_proj"),
        ):
            prefix = f"model.layers.{layer}"
            kept = after[f"{prefix}.{name}.weight"].dtype == torch.bfloat16
            assert kept == (f"{prefix}.{name}.weight_scale_inv" not in after)
            assert kept == is_layer_skipped(f"{prefix}.{merged}", listed)
    assert f"{ATTENTION}.qkv_proj" in listed


def test_mixture_of_experts_router_and_head_stay(tmp_path):
    source = write_checkpoint(
        tmp_path / "in",
        lm_head__weight=(64, 64),
        model__embed_tokens__weight=(64, 64),
        **weights(
            mlp__gate=(8, 64),
            mlp__experts__0__gate_proj=(64, 64),
            mlp__experts__0__up_proj=(64, 64),
            mlp__shared_experts__gate_proj=(64, 64),
            mlp__shared_experts__up_proj=(64, 64),
        ),
    )
    assert main([str(source), str(tmp_path / "out")]) == 0
    config = read_config(tmp_path / "out")["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", f"{LAYER}.mlp.gate"]
    converted = read_checkpoint(tmp_path / "out")
    assert sum(name.endswith("_scale_inv") for name in converted) == 4


QKV = weights(
    self_attn__q_proj=(64, 64), self_attn__k_proj=(64, 64), self_attn__v_proj=(64, 64)
)


@pytest.mark.parametrize(
    "shapes, arguments, words",
    [
        pytest.param(
            weights(mlp__down_proj=(64, 48)),
            [],
            [f"{LAYER}.mlp.down_proj.weight", "K = 48", "--ignore '*.down_proj'"],
            id="K",
        ),
        pytest.param(
            QKV,
            ["--ignore", "*.k_proj"],
            [f"{ATTENTION}.k_proj", "q_proj, k_proj, v_proj", "qkv_proj"],
            id="part of qkv",
        ),
        pytest.param(
            weights(mlp__gate_proj=(64, 64), mlp__up_proj=(64, 64)),
            ["--ignore", f"{LAYER}.mlp.up_proj"],
            [f"{LAYER}.mlp.up_proj", "gate_proj, up_proj"],
            id="part of gate_up",
        ),
        pytest.param(
            QKV, ["--ignore", "*.qproj"], ["'*.qproj'", "no linear"], id="typo"
        ),
        pytest.param(QKV, ["--ignore", "*"], ["no linear is left"], id="all ignored"),
        pytest.param(
            weights(mlp__gate=(8, 64), mlp__gate_proj=(64, 64), mlp__up_proj=(64, 64)),
            [],
            [f"{LAYER}.mlp.gate stays", "would then skip"],
            id="name within a name",
        ),
        pytest.param(
            {**QKV, "model__layers__0__mlp__experts__gate_up_proj": (2, 64, 64)},
            [],
            ["experts.gate_up_proj", "3-D"],
            id="fused experts",
        ),
        pytest.param(
            {**QKV, **weights(mlp__experts__0__w1=(64, 64))},
            ["--ignore", "*.w1"],
            [f"{LAYER}.mlp.experts.0.w1 is an expert"],
            id="ignored expert",
        ),
        pytest.param(
            weights(mlp__down_proj=torch.zeros(32, 32).to(torch.float8_e4m3fn)),
            [],
            [f"{LAYER}.mlp.down_proj.weight", "already quantized"],
            id="fp8",
        ),
        pytest.param(
            {**QKV, "model__layers__0__self_attn__q_proj__weight_scale_inv": (64, 2)},
            [],
            ["weight_scale_inv", "already quantized"],
            id="scales",
        ),
        pytest.param(
            weights(mlp__down_proj=torch.full((32, 32), torch.nan)),
            [],
            [f"{LAYER}.mlp.down_proj.weight", "NaN"],
            id="NaN",
        ),
        pytest.param(QKV, ["--device", "cuda"], ["no CUDA device"], id="no device"),
    ],
)
def test_refusals(shapes, arguments, words, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    source = write_checkpoint(tmp_path / "in", **shapes)
    assert_refused(
        capsys, tmp_path, [str(source), str(tmp_path / "out"), *arguments], words
    )


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_names_within_names_matter_to_sglang_alone(form, tmp_path):
    """The other formats' readers compare whole names."""
    shapes = weights(mlp__gate=(8, 64), mlp__gate_proj=(64, 64), mlp__up_proj=(64, 64))
    source = write_checkpoint(tmp_path / "in", **shapes)
    assert main([str(source), str(tmp_path / "out"), f"--format={form}"]) == 0
    listed = read_config(tmp_path / "out")["quantization_config"]["ignore"]
    assert listed == ["lm_head", f"{LAYER}.mlp.gate"]


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_part_of_a_merged_linear_is_refused_in_every_format(form, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", **QKV)
    arguments = [str(source), str(tmp_path / "out"), f"--format={form}"]
    words = [f"{ATTENTION}.k_proj", "q_proj, k_proj, v_proj", "qkv_proj"]
    assert_refused(capsys, tmp_path, [*arguments, "--ignore", "*.k_proj"], words)


@pytest.mark.parametrize("form", sorted(convert_to_mxfp8.FORMATS))
def test_what_it_wrote_is_refused_as_input(form, tmp_path, capsys):
    source, output = write_checkpoint(tmp_path / "in", **QKV), tmp_path / "out"
    assert main([str(source), str(output), f"--format={form}"]) == 0
    again = [str(output), str(tmp_path / "again")]
    assert_refused(capsys, tmp_path, again, ["already quantized", "config.json"])
    (output / "config.json").write_text("{}")
    (output / "hf_quant_config.json").unlink(missing_ok=True)
    assert_refused(capsys, tmp_path, again, [f"{ATTENTION}.", "already quantized"])


def test_unknown_format(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "in"), str(tmp_path / "out"), "--format=gguf"])
    assert exit.value.code == 2
    assert "'sglang', 'modelopt', 'compressed-tensors'" in capsys.readouterr().err


def assert_refused(capsys, directory: Path, arguments, words) -> None:
    """Refused with 2 and one line that has `words`, and nothing is left in `directory`."""
    before = sorted(directory.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("convert_to_mxfp8: ")
    ]
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize(
    "config", [{"quant_method": "fp8"}, {"quant_method": "mxfp8"}], ids=str
)
def test_already_quantized_config(config, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", {"quantization_config": config}, **QKV)
    words = ["already quantized", config["quant_method"], "original"]
    assert_refused(capsys, tmp_path, [str(source), str(tmp_path / "out")], words)


def test_already_quantized_by_modelopt(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", **QKV)
    (source / "hf_quant_config.json").write_text("{}")
    words = ["already quantized", "hf_quant_config.json"]
    assert_refused(capsys, tmp_path, [str(source), str(tmp_path / "out")], words)


def test_incomplete_checkpoints(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", **QKV)
    arguments = [str(source), str(tmp_path / "out")]
    weight = f"{ATTENTION}.q_proj.weight"

    def index(**weight_map):
        text = json.dumps({"weight_map": weight_map})
        (source / "model.safetensors.index.json").write_text(text)

    index(**{weight: "model-00001-of-00002.safetensors"})
    words = ["model-00001-of-00002.safetensors is missing"]
    assert_refused(capsys, tmp_path, arguments, words)

    index(**{"other.weight": "model.safetensors"})
    assert_refused(
        capsys, tmp_path, arguments, ["model.safetensors lacks other.weight"]
    )

    (source / "model.safetensors.index.json").write_text("{")
    assert_refused(capsys, tmp_path, arguments, ["is not JSON"])

    (source / "model.safetensors.index.json").unlink()
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert_refused(capsys, tmp_path, arguments, ["model.safetensors is damaged"])

    file.rename(source / "pytorch_model.bin")
    assert_refused(capsys, tmp_path, arguments, ["has neither", "save_pretrained"])

    (source / "config.json").unlink()
    assert_refused(capsys, tmp_path, arguments, ["has no config.json"])


def test_output_is_never_overwritten_unasked(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "in", **QKV)
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    arguments = [str(source), str(output)]
    assert_refused(capsys, tmp_path, arguments, ["is not empty", "--overwrite"])
    assert_refused(capsys, tmp_path, [str(source)] * 2 + ["--overwrite"], ["inside"])
    inside = str(source / "out")
    assert_refused(capsys, tmp_path, [str(source), inside], ["inside one another"])

    assert main([*arguments, "--overwrite"]) == 0
    assert read_config(output)["quantization_config"]["quant_method"] == "mxfp8"
    assert not (output / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, "SIGTERM"])
def test_interrupted_run_leaves_what_was_there(interruption, tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "in", **QKV)
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")

    def interrupt(*args, **kwargs):
        if interruption == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_to_mxfp8, "_write_json", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([str(source), str(output), "--overwrite"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert (output / "mine").read_text() == "precious"


def test_staged_directory_needs_no_existing_parent(tmp_path):
    target = tmp_path / "a" / "b"
    with staged_directory(target) as staging:
        (staging / "file").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["b"]


@given(
    sizes=st.lists(st.integers(min_value=1, max_value=300), min_size=1, max_size=40),
    limit=st.integers(min_value=1, max_value=600),
)
def test_shard_plan(sizes, limit):
    tensors = [Tensor(str(i), "f", "BF16", (s,), 2 * s) for i, s in enumerate(sizes)]
    shards = _plan_shards(tensors, set(), limit)
    assert [tensor for shard in shards for tensor in shard] == tensors
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.bytes for tensor in shard) <= limit


@pytest.mark.parametrize("size", ["0GB", "GB", "-1MB", "1TB", ""])
def test_sizes_that_are_none(size, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["in", "out", f"--max-shard-size={size}"])
    assert exit.value.code == 2
    assert "say 500MB or 2GB" in capsys.readouterr().err
