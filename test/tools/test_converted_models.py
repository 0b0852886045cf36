"""Tiny random models of many architectures: what the converter writes, sglang loads.

Their names are not sglang's: modules are renamed while they load, fused, or built without
a name (SmolLM3, which runs on the Transformers backend).
"""

import json

import pytest
import torch
import transformers
from convert_to_mxfp8 import main
from safetensors.torch import load_file, save_file

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
MROPE = {"mrope_section": [4, 6, 6]}
VISION = dict(hidden_size=64, num_heads=2, depth=1, out_hidden_size=128)
SIGLIP = dict(hidden_size=64, num_attention_heads=2, image_size=32, patch_size=16)
LLAMA4 = dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=256)
GPT_OSS = dict(TEXT, num_local_experts=4, swiglu_limit=7.0)


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
        4,
    ),
    "qwen3_vl": (
        with_tower(
            {**VISION, "deepstack_visual_indexes": [0]},
            {**TEXT, "rope_scaling": {"rope_type": "default", **MROPE}},
        ),
        4,
    ),
    "qwen2_5_vl": (
        with_tower(
            {**VISION, "intermediate_size": 100},
            {**TEXT, "rope_scaling": {"type": "mrope", **MROPE}},
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
    # Refused, see below.
    "gpt_oss": (GPT_OSS, 0),
    "gpt2": (dict(n_embd=128, n_layer=1, n_head=4, vocab_size=320), 0),
}
SERVED = [kind for kind, (_, linears) in MODELS.items() if linears]


@pytest.fixture(scope="module", autouse=True)
def server_like():
    from ask_sglang import init_single_process_parallel_state
    from sglang.test.mxfp8_utils import fp8_gemm_backend

    init_single_process_parallel_state()
    with fp8_gemm_backend("flashinfer_trtllm"):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny random model of this kind; of two kinds, each is made once."""
    paths = {}

    def save(kind: str):
        if kind not in paths:
            paths[kind] = tmp_path_factory.mktemp("models") / kind
            config = transformers.AutoConfig.for_model(kind, **MODELS[kind][0])
            auto = transformers.AutoModelForCausalLM
            if hasattr(config, "vision_config"):
                auto = transformers.AutoModelForImageTextToText
            auto.from_config(config).bfloat16().save_pretrained(paths[kind])
        return paths[kind]

    return save


def ignored(kind: str) -> list[str]:
    has_experts = "moe" in kind or kind in ("qwen3_next", "llama4")
    return ["--ignore=*.experts.*"] if has_experts else []


@pytest.mark.parametrize("form", ["sglang", "modelopt", "compressed-tensors"])
@pytest.mark.parametrize("kind", SERVED)
def test_what_is_converted_is_what_is_loaded(kind, form, saved, tmp_path):
    """With experts, where there are some, and the text's second layer in bf16."""
    from sglang.srt.layers.quantization.mxfp8.weights import mxfp8_weights_of
    from sglang.test.mxfp8_utils import load_on_cpu

    layer = "*language_model*.layers.1.*" if "gemma" in kind else "*layers.1.*"
    output = tmp_path / "out"
    arguments = [str(saved(kind)), str(output), f"--format={form}", *ignored(kind)]
    arguments.append(f"--ignore={layer}")
    assert main(arguments) == 0
    model = load_on_cpu(str(output))
    assert len(mxfp8_weights_of(model)) == MODELS[kind][1]
    # Nothing of the model that was asked is in it.
    held = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in held if tensor.is_meta]


@pytest.mark.parametrize("kind", [kind for kind in SERVED if kind != "qwen3_next"])
def test_scales_of_an_fp8_cache_are_used(kind, saved, tmp_path):
    from sglang.srt.layers.quantization.mxfp8.names import kv_caches
    from sglang.test.mxfp8_utils import load_on_cpu

    output = with_cache_scales(saved(kind), tmp_path / "out")
    model = load_on_cpu(str(output))
    caches = [c for n, c in kv_caches(model).items() if "vision" not in n]
    assert len(caches) == 2
    for cache in caches:
        assert (cache.k_scale.item(), cache.v_scale.item()) == (0.25, 0.5)
        assert (cache.k_scale_float, cache.v_scale_float) == (0.25, 0.5)

    # An update, by the same names.
    tensors = load_file(output / "model.safetensors")
    name, tensor = next(
        x for x in tensors.items() if x[0].endswith(("k_scale", "v_scale"))
    )
    model.load_weights([(name, tensor * 4)])
    assert {cache.k_scale_float for cache in caches} == {0.25, 1.0}
    with pytest.raises(ValueError, match=f"{name} is -1.0: a scale is a positive"):
        model.load_weights([(name, -torch.ones(()))])
    for other in ("nowhere.k_scale", "nowhere.self_attn.v_proj.output_scale"):
        with pytest.raises(ValueError, match=f"{other}: the model has no such KV"):
            model.load_weights([(other, tensor)])


def with_cache_scales(source, output):
    """The model in MXFP8 with scales of a cache, 0.25 and 0.5, as ModelOpt names them; of
    a fused projection, and in the second layer, as compressed-tensors does."""
    assert main([str(source), str(output), *ignored(source.name)]) == 0
    path = output / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        attention, dot, last = name.partition(".self_attn.")
        if last in ("k_proj.weight", "qkv_proj.weight") and "vision" not in name:
            plain = ".1.self_attn" in name or last == "qkv_proj.weight"
            for part, scale in (("k", 0.25), ("v", 0.5)):
                middle = "" if plain else f"{part}_proj."
                scale_name = f"{attention}{dot}{middle}{part}_scale"
                tensors[scale_name] = torch.tensor(scale)
    save_file(tensors, path, metadata={"format": "pt"})
    return output


def test_experts_are_converted_with_the_rest(saved, tmp_path):
    output = tmp_path / "out"
    assert main([str(saved("qwen3_moe")), str(output)]) == 0
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    gates = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert config["modules_to_not_convert"] == ["lm_head", *gates]


@pytest.mark.parametrize(
    "kind, ignored, words",
    [
        ("qwen3_moe", ["--ignore=*.experts.1.*"], "experts.1.down_proj is kept"),
        ("gpt_oss", [], "experts.down_proj holds all experts in one 3-D tensor"),
        # sglang builds its attention without a quantization config.
        ("gpt_oss", ["--ignore=*.experts.*"], "no linear is left to convert"),
        # sglang transposes its weights while it loads them.
        ("gpt2", [], "no linear is left to convert"),
    ],
)
def test_refusals(kind, ignored, words, saved, tmp_path, capsys):
    assert main([str(saved(kind)), str(tmp_path / "out"), *ignored]) == 2
    assert words in capsys.readouterr().err
