"""Tiny random models of many architectures: what the converter writes, sglang loads.

Their names are not sglang's: modules are renamed while they load, fused, or built without
a name (SmolLM3, which runs on the Transformers backend).
"""

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import read_config, read_tensors, write
from convert_to_mxfp8 import main

from sglang.srt.layers.quantization.mxfp8.lifecycle import mxfp8_checkpoint_form
from sglang.srt.layers.quantization.mxfp8.names import kv_caches
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize, quantize
from sglang.srt.layers.quantization.mxfp8.weights import mxfp8_weights_of
from sglang.test.mxfp8_utils import (
    as_on_a_gpu,
    fp8_gemm_backend,
    init_single_process_parallel_state,
    load_on_cpu,
    with_weight_scale,
)

TEXT = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=320,
    pad_token_id=0,
    max_position_embeddings=128,
)
MOE = dict(TEXT, num_experts_per_tok=2, moe_intermediate_size=64)
SHARED = dict(MOE, num_experts=4, shared_expert_intermediate_size=64)
HYBRID = dict(
    full_attention_interval=2,
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
)
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}
SIGLIP = dict(hidden_size=64, num_attention_heads=2, image_size=32, patch_size=16)
LLAMA4 = dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=256)
GPT_OSS = dict(TEXT, num_local_experts=4, swiglu_limit=7.0)
GPT = dict(n_embd=128, n_layer=2, n_head=4, vocab_size=320)


def with_tower(tower: dict, text: dict = TEXT, **config) -> dict:
    return dict(text_config=text, vision_config=tower, **config)


# Its configuration, and how many linears of one of its layers become MXFP8.
MODELS = {
    "glm4_moe": (dict(MOE, n_routed_experts=4, first_k_dense_replace=0), 4),
    "qwen3_moe": (dict(MOE, num_experts=4), 2),
    "qwen2_moe": (SHARED, 4),
    "qwen3_next": ({**SHARED, **HYBRID}, 5),
    "llama4": (
        with_tower(
            {**SIGLIP, "num_hidden_layers": 1, "intermediate_size": 256},
            {**TEXT, **LLAMA4, "rope_scaling": None},
        ),
        3,  # it rearranges q_proj and k_proj while it loads them
    ),
    "qwen3_vl": (
        with_tower(
            dict(hidden_size=64, num_heads=2, depth=1, out_hidden_size=128)
            | {"deepstack_visual_indexes": [0]},
            {**TEXT, "rope_scaling": MROPE},
        ),
        4,
    ),
    "gemma3": (
        with_tower(
            dict(SIGLIP, num_hidden_layers=2, intermediate_size=100)
            | {"vision_use_head": False},
            mm_tokens_per_image=4,
        ),
        4,
    ),
    **dict.fromkeys(("phi3", "qwen2", "granite", "olmo2", "cohere2"), (TEXT, 4)),
    "smollm3": (TEXT, 7),
    "lfm2": (TEXT, 5),  # which sglang does not build for triton's attention
    "gpt_bigcode": (GPT, 3),
    # Refused, see below.
    "gpt_oss": (GPT_OSS, 0),
    "gpt2": (GPT, 0),
}
DIRECTORY = tempfile.TemporaryDirectory()
SERVED = [kind for kind, (_, linears) in MODELS.items() if linears]
# What stays in bf16: the text's second layer, and what sglang does not have in MXFP8.
IGNORED = {
    "gemma3": ["*language_model*.layers.1.*"],
    "gpt_bigcode": ["*.h.1.*", "*.c_attn"],
}
for moe in ("glm4_moe", "qwen3_moe", "qwen2_moe", "qwen3_next", "llama4"):
    IGNORED[moe] = ["*layers.1.*", "*.experts.*"]


@pytest.fixture(scope="module", autouse=True)
def server_like():
    init_single_process_parallel_state()
    with as_on_a_gpu(), fp8_gemm_backend("flashinfer_trtllm"):
        yield


@functools.cache
def saved(kind: str) -> Path:
    """A tiny random model of this kind."""
    path = Path(DIRECTORY.name) / kind
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind][0])
    auto = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = transformers.AutoModelForImageTextToText
    auto.from_config(config).bfloat16().save_pretrained(path)
    return path


@functools.cache
def converted(kind: str) -> Path:
    path = Path(DIRECTORY.name) / f"{kind}-MXFP8"
    patterns = IGNORED.get(kind, ["*layers.1.*"])
    ignored = [f"--ignore={pattern}" for pattern in patterns]
    assert main([str(saved(kind)), str(path), *ignored]) == 0
    return path


@pytest.mark.parametrize("form", ["sglang", "modelopt"])
@pytest.mark.parametrize("kind", SERVED)
def test_what_is_converted_is_what_is_loaded(kind, form, tmp_path):
    """Each layer holds what sglang makes of the bf16 model, to MXFP8's precision."""
    path = converted(kind)
    if form == "modelopt":
        path = as_modelopt(path, tmp_path / "out")
    expected = dict(load_on_cpu(str(saved(kind))).named_parameters())
    model = load_on_cpu(str(path))
    layers = mxfp8_weights_of(model)
    assert len(layers) == MODELS[kind][1]
    with mxfp8_checkpoint_form(model):
        for own in layers:
            held = dequantize(own.layer.weight, own.layer.weight_scale_inv)
            original = expected[f"{own.name}.weight"].float()
            assert (held - original).norm() < 0.04 * original.norm(), own.name
    # Nothing of the model that was asked is in it.
    held = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in held if tensor.is_meta]


def as_modelopt(source: Path, output: Path) -> Path:
    """As ModelOpt writes it, which lists layers by the checkpoint's names alone."""
    tensors, config = read_tensors(source), read_config(source)
    kept = [n for n, t in tensors.items() if t.dim() > 1 and t.itemsize > 1]
    ignore = [name.removesuffix(".weight") for name in kept]
    config["quantization_config"] = dict(quant_algo="MXFP8", ignore=ignore)
    config["quantization_config"]["quant_method"] = "modelopt"
    shutil.copytree(source, output)
    return write(output, with_weight_scale(tensors), config)


WITHOUT_CACHE_SCALES = ("qwen3_next", "gpt_bigcode")


@pytest.mark.parametrize("kind", [k for k in SERVED if k not in WITHOUT_CACHE_SCALES])
def test_scales_of_an_fp8_cache_are_used(kind, tmp_path):
    output = with_cache_scales(converted(kind), tmp_path / "out")
    model = load_on_cpu(str(output))
    caches = [c for n, c in kv_caches(model).items() if "vision" not in n]
    assert len(caches) == 2
    for cache in caches:
        assert (cache.k_scale.item(), cache.v_scale.item()) == (0.25, 0.5)
        assert (cache.k_scale_float, cache.v_scale_float) == (0.25, 0.5)


def with_cache_scales(source: Path, output: Path) -> Path:
    """The checkpoint with scales of a cache, 0.25 and 0.5, as ModelOpt names them; of a
    fused projection, and in the second layer, as compressed-tensors does."""
    tensors = read_tensors(source)
    for name in list(tensors):
        attention, dot, last = name.partition(".self_attn.")
        if last in ("k_proj.weight", "qkv_proj.weight") and "vision" not in name:
            plain = ".1.self_attn" in name or last == "qkv_proj.weight"
            for part, scale in (("k", 0.25), ("v", 0.5)):
                middle = "" if plain else f"{part}_proj."
                scale_name = f"{attention}{dot}{middle}{part}_scale"
                tensors[scale_name] = torch.tensor(scale)
    return write(output, tensors, read_config(source))


def test_a_weight_that_is_rearranged_without_its_scale_is_refused(tmp_path):
    """Llama 4 permutes the rows of q and k, by the names of their weights."""
    source = converted("llama4")
    tensors, config = read_tensors(source), read_config(source)
    layer = "language_model.model.layers.0.self_attn"
    for name in [f"{layer}.{part}_proj.weight" for part in "qkv"]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensors[name])
    kept = config["quantization_config"]["modules_to_not_convert"]
    kept[:] = [name for name in kept if layer not in name]
    path = write(tmp_path / "out", tensors, config)
    with pytest.raises(ValueError, match=rf"rearranges {layer}.[qk]_proj.weight as it"):
        load_on_cpu(str(path))


def test_experts_are_converted_with_the_rest(tmp_path):
    assert main([str(saved("qwen3_moe")), str(tmp_path / "out")]) == 0
    config = read_config(tmp_path / "out")["quantization_config"]
    gates = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    kept = ["lm_head", "model.embed_tokens", *gates]
    assert config["modules_to_not_convert"] == kept


@pytest.mark.parametrize(
    "kind, ignored, words",
    [
        ("qwen3_moe", ["--ignore=*.experts.1.*"], "experts is one layer here"),
        # sglang builds its attention without a quantization config; experts are 3-D.
        ("gpt_oss", [], "no linear is left to convert"),
        ("gpt_oss", ["--ignore=*.experts.*"], "no linear is left to convert"),
        # sglang transposes its weights while it loads them.
        ("gpt2", [], "no linear is left to convert"),
        # sglang loads one scale for each of q, k and v.
        ("gpt_bigcode", [], "c_attn.weight_scale_inv (shard q) is [128, 4], got"),
    ],
)
def test_refusals(kind, ignored, words, tmp_path, capsys):
    assert main([str(saved(kind)), str(tmp_path / "out"), *ignored]) == 2
    assert words in capsys.readouterr().err
