"""MXFP8 checkpoints of every format, from their config to a model that serves them.

Real configs, real upstream loaders, on a CPU, where FlashInfer's kernels are emulated. The
servers run when MXFP8_TEST_MODEL names the MXFP8 checkpoint of SmolLM2-135M-Instruct.
"""

import contextlib
import json
import os
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.layers.quantization.mxfp8 import names
from sglang.srt.layers.quantization.mxfp8.formats import (
    LayerList,
    describe_mxfp8,
    flat_modelopt_mxfp8,
)
from sglang.srt.layers.quantization.mxfp8.layout import swizzle_scale
from sglang.srt.layers.quantization.mxfp8.lifecycle import mxfp8_checkpoint_form
from sglang.srt.layers.quantization.mxfp8.names import Mxfp8Plan
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TINY_LLAMA,
    fp8_gemm_backend,
    fused_parameters,
    init_single_process_parallel_state,
    load_on_cpu,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="default")

MXFP8_SCHEME = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "symmetric": True,
    "dynamic": False,
}
FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}


def compressed_tensors(*targets, **changes) -> dict:
    group = {
        "targets": list(targets or ["Linear"]),
        "weights": MXFP8_SCHEME,
        "input_activations": {**MXFP8_SCHEME, "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **changes,
    }


def modelopt(**changes) -> dict:
    return {
        "quant_method": "modelopt",
        "quant_algo": "MXFP8",
        "config_groups": {
            "group_0": {"weights": {"num_bits": 8, "group_size": 32, "type": "float"}}
        },
        "ignore": ["lm_head"],
        **changes,
    }


def hf_quant_config(**changes) -> dict:
    return {
        "producer": {"name": "modelopt", "version": "0.40.0"},
        "quantization": {
            "quant_algo": "MXFP8",
            "group_size": 32,
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"],
            **changes,
        },
    }


class TestDescription(CustomTestCase):
    def test_every_format_becomes_one(self):
        own = TINY_LLAMA["quantization_config"]
        for config, name, ignored in (
            (own, "mxfp8", []),
            ({**own, "modules_to_not_convert": ["lm_head"]}, "mxfp8", ["lm_head"]),
            (modelopt(), "modelopt", ["glob:lm_head"]),
            (flat_modelopt_mxfp8(hf_quant_config()), "modelopt", ["glob:lm_head"]),
            (flat_modelopt_mxfp8(modelopt()), "modelopt", ["glob:lm_head"]),
            (modelopt(quant_algo="mxfp8"), "modelopt", ["glob:lm_head"]),
            (modelopt(group_size=None), "modelopt", ["glob:lm_head"]),
            ({**own, "quant_method": "fp8"}, "mxfp8", []),
            ({**own, "scale_fmt": "UE8M0"}, "mxfp8", []),
            (compressed_tensors(), "compressed-tensors", ["glob:lm_head"]),
        ):
            with self.subTest(config=config):
                described = describe_mxfp8(config)
                self.assertEqual(
                    described,
                    {
                        **config,
                        "quant_method": "mxfp8",
                        "activation_scheme": "dynamic",
                        "weight_block_size": [1, 32],
                        "scale_fmt": "ue8m0",
                        "mxfp8_format": name,
                        "ignored_layers": ignored,
                    },
                )
                self.assertEqual(describe_mxfp8(described), described)

    def test_both_lists_of_our_own_form_count(self):
        described = describe_mxfp8(
            {
                "quant_method": "mxfp8",
                "ignored_layers": ["a", "b"],
                "modules_to_not_convert": ["b", "c"],
            }
        )
        self.assertEqual(described["ignored_layers"], ["a", "b", "c"])

    def test_entries_of_our_own_form_mean_what_they_say(self):
        names = [
            "model.layers.0.mlp.down_proj.weight",
            "*.1.self_attn.*",
            "re:.*o_proj",
        ]
        described = describe_mxfp8({"quant_method": "mxfp8", "ignored_layers": names})
        self.assertEqual(describe_mxfp8(described), described)
        listed = LayerList(described["ignored_layers"])
        for name, is_mxfp8 in (
            ("model.layers.0.mlp.down_proj", False),
            ("model.layers.1.self_attn.qkv_proj", False),
            ("model.layers.0.self_attn.o_proj", False),
            ("model.layers.0.self_attn.qkv_proj", True),
            ("model.layers.1.mlp.down_proj", True),
        ):
            self.assertEqual(listed.has_layer(name), is_mxfp8, name)

    def test_an_hf_quant_config_that_says_nothing(self):
        with self.assertRaisesRegex(ValueError, 'no "quantization", only producer'):
            flat_modelopt_mxfp8({"producer": {"name": "modelopt"}})

    def test_an_fp8_cache_is_told(self):
        for config in (
            modelopt(kv_cache_scheme=FP8_CACHE),
            flat_modelopt_mxfp8(hf_quant_config(kv_cache_quant_algo="FP8")),
            compressed_tensors(kv_cache_scheme=FP8_CACHE),
        ):
            described = describe_mxfp8(config)
            self.assertEqual(described["kv_cache_quant_algo"], "FP8")
            self.assertEqual(describe_mxfp8(described), described)

    def test_other_quantization_is_not_ours(self):
        fp8_scheme = {**MXFP8_SCHEME, "strategy": "channel", "group_size": None}
        for config in (
            None,
            {},
            {"quant_method": "fp8", "activation_scheme": "dynamic"},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            modelopt(
                quant_algo="MIXED_PRECISION",
                quantized_layers={"a": {"quant_algo": "W4A8_AWQ"}},
            ),
            {"quant_method": "auto-round", "data_type": "int", "bits": 4},
            {"quant_method": "awq"},
            compressed_tensors(
                config_groups={"g": {"targets": ["Linear"], "weights": fp8_scheme}}
            ),
        ):
            with self.subTest(config=config):
                self.assertIsNone(describe_mxfp8(config))
        for changes in (
            {"quant_algo": "FP8"},
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}},
        ):
            self.assertIsNone(flat_modelopt_mxfp8(hf_quant_config(**changes)))

    def test_what_is_not_served_is_refused_by_name(self):
        groups = compressed_tensors()["config_groups"]
        fp8_group = {"targets": ["re:.*mlp"], "weights": {"num_bits": 8, "type": "int"}}
        for config, message in (
            (
                {"quant_method": "auto-round", "data_type": "mx_fp", "bits": 8},
                r"AutoRound's MXFP8 .* is not served. MXFP8 is served from .*ModelOpt",
            ),
            (
                modelopt(
                    quant_algo="MIXED_PRECISION",
                    quantized_layers={
                        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4"},
                        "model.layers.0.self_attn": {"quant_algo": "MXFP8"},
                    },
                ),
                "ModelOpt MIXED_PRECISION of MXFP8, NVFP4 is not served",
            ),
            (modelopt(group_size=16), "group_size 16"),
            (modelopt(kv_cache_quant_algo="NVFP4"), "kv_cache_quant_algo 'NVFP4'"),
            (
                compressed_tensors(kv_cache_scheme={**FP8_CACHE, "type": "int"}),
                "kv_cache_scheme .*'int'.* is not served",
            ),
            (
                {"quant_method": "fp8", "weight_block_size": [1, 32]},
                'is MXFP8 only if .*"scale_fmt": "ue8m0"',
            ),
            (
                compressed_tensors(transform_config={"config_groups": {"u": {}}}),
                "with a transform_config is not served",
            ),
            (
                compressed_tensors(sparsity_config={"format": "sparse-24-bitmask"}),
                "with a sparsity_config is not served",
            ),
            (
                compressed_tensors(
                    config_groups={
                        "g": {**groups["group_0"], "output_activations": MXFP8_SCHEME}
                    }
                ),
                r"with output_activations \(g\)",
            ),
            (compressed_tensors("LlamaAttention"), "'LlamaAttention' names a class"),
            (
                compressed_tensors(config_groups={**groups, "group_1": fp8_group}),
                r"compressed-tensors with MXFP8 and other formats \(group_1\)",
            ),
            (
                {"quant_method": "mxfp8", "activation_scheme": "static"},
                "activation_scheme 'static'",
            ),
            (
                {"quant_method": "mxfp8", "weight_block_size": [128, 128]},
                r"weight_block_size \[128, 128\]",
            ),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                describe_mxfp8(config)

    def test_w8a16_is_served_as_w8a8_only_if_the_user_says_so(self):
        group = {"targets": ["Linear"], "weights": MXFP8_SCHEME}
        config = compressed_tensors(config_groups={"group_0": group})
        with self.assertRaisesRegex(ValueError, "W8A16.*--quantization mxfp8"):
            describe_mxfp8(config)
        described = describe_mxfp8(config, as_w8a8=True)
        self.assertEqual(described["mxfp8_format"], "compressed-tensors")


class TestLayerNames(CustomTestCase):
    def assert_kept(self, ignored, kept, quantized) -> None:
        for name in kept:
            self.assertFalse(LayerList(ignored).has_layer(name), name)
        for name in quantized:
            self.assertTrue(LayerList(ignored).has_layer(name), name)

    def test_globs(self):
        self.assert_kept(
            ["glob:model.layers.0.self_attn*", "glob:lm_head", "glob:mtp*"],
            [
                "model.layers.0.self_attn.qkv_proj",
                "language_model.model.layers.0.self_attn.o_proj",
                "lm_head",
                "model.mtp.layers.0.down_proj",
            ],
            [
                "model.layers.0.mlp.down_proj",
                "model.layers.10.self_attn.o_proj",
                "model.lm_head_norm",
            ],
        )

    def test_what_llm_compressor_wraps(self):
        self.assert_kept(
            ["glob:model.layers.0.mlp.gate_proj.linear", "glob:*.linear"],
            ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj.linear"],
            ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"],
        )

    def test_a_module_is_all_its_layers(self):
        self.assert_kept(
            ["glob:model.layers.1", "glob:visual"],
            ["model.layers.1.mlp.gate_up_proj", "visual.blocks.0.mlp.down_proj"],
            ["model.layers.10.mlp.gate_up_proj", "model.layers.0.o_proj"],
        )

    def test_regular_expressions_match_from_the_start(self):
        self.assert_kept(
            ["re:.*self_attn.*", r"re:model\.layers\.0\."],
            ["model.layers.3.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"],
            ["model.layers.3.mlp.down_proj", "draft.model.layers.0.mlp.down_proj"],
        )

    def test_targets_leave_the_rest(self):
        described = describe_mxfp8(
            compressed_tensors(
                "re:.*mlp.*", "model.layers.0.self_attn.o_proj", ignore=["re:.*1.mlp.*"]
            )
        )
        self.assert_kept(
            described["ignored_layers"],
            ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"],
            ["model.layers.0.mlp.gate_up_proj", "model.layers.0.self_attn.o_proj"],
        )

    def test_targets_that_name_the_parts_of_a_fused_layer(self):
        described = describe_mxfp8(
            compressed_tensors(
                r"re:.*self_attn\.(q|k|v|o)_proj$",
                "model.layers.0.mlp.gate_proj",
                "model.layers.0.mlp.up_proj",
            )
        )
        self.assert_kept(
            described["ignored_layers"],
            ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_up_proj"],
            ["model.layers.1.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"],
        )

    def test_targets_that_name_a_layer_that_is_fused_on_disk(self):
        described = describe_mxfp8(compressed_tensors(r"re:.*qkv_proj$"))
        self.assert_kept(
            described["ignored_layers"],
            ["layers.0.mlp.gate_up_proj"],
            ["layers.0.self_attn.qkv_proj"],
        )

    def test_a_fused_layer_by_its_own_name(self):
        for kind in ("", "glob:", "re:"):
            ignored = [f"{kind}model.layers.0.self_attn.qkv_proj"]
            self.assert_kept(
                ignored,
                ["model.layers.0.self_attn.qkv_proj"],
                ["model.layers.1.self_attn.qkv_proj"],
            )

    def test_parts_of_a_fused_layer(self):
        attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        for fused, parts in (
            (f"{attention}.qkv_proj", "q_proj k_proj v_proj"),
            (f"{mlp}.gate_up_proj", "gate_proj up_proj"),
            (
                f"{attention}.fused_qkv_a_proj_with_mqa",
                "q_a_proj kv_a_proj_with_mqa",
            ),
            (
                f"{mlp}.experts",
                "experts.0.gate_proj experts.0.up_proj experts.0.down_proj",
            ),
            (f"{mlp}.experts", "experts.0.w1 experts.0.w2 experts.0.w3"),
        ):
            parent = fused.rpartition(".")[0]
            names = [f"{parent}.{part}" for part in parts.split()]
            for kind in ("", "glob:", "re:"):
                ignored = [f"{kind}{name}" for name in names]
                with self.subTest(fused=fused, kind=kind):
                    self.assert_kept(ignored, [fused], [fused.replace(".0.", ".2.")])
                    for part in (ignored[-1], f"re:.*{re.escape(names[-1][-6:])}$"):
                        with self.assertRaisesRegex(
                            ValueError, f"{fused} is one layer.*{names[-1]} not: "
                        ):
                            LayerList([part]).has_layer(fused)

    def test_one_expert_of_many(self):
        experts = "model.layers.3.mlp.experts"
        modules = [f"{experts}.{i}.{p}_proj" for i in range(9) for p in ("gate", "up")]
        with self.assertRaisesRegex(ValueError, f"{experts} is one layer.*, ... in"):
            LayerList([f"glob:{experts}.5.gate_proj"]).has_layer(experts, modules)

    def test_a_layer_without_a_name_is_quantized(self):
        self.assertTrue(LayerList(["glob:lm_head", "re:.+"]).has_layer(""))


def with_format(directory, tensors, quantization=None, files=()) -> str:
    """A tiny Llama's checkpoint with `weight_scale`, and what declares its format."""
    renamed = {
        name.replace("weight_scale_inv", "weight_scale"): tensor
        for name, tensor in tensors.items()
    }
    write_checkpoint(directory, renamed, quantization_config=quantization)
    if quantization is None:
        config = Path(directory, "config.json")
        declared = json.loads(config.read_text())
        del declared["quantization_config"]
        config.write_text(json.dumps(declared))
    for name, content in dict(files).items():
        Path(directory, name).write_text(json.dumps(content))
    return directory


FORMATS = {
    "modelopt in config.json": dict(quantization=modelopt()),
    "modelopt without a method": dict(
        quantization={k: v for k, v in modelopt().items() if k != "quant_method"}
    ),
    "modelopt in hf_quant_config.json": dict(
        files={"hf_quant_config.json": hf_quant_config()}
    ),
    "compressed-tensors": dict(quantization=compressed_tensors()),
}


class FormatTestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.enterClassContext(fp8_gemm_backend("flashinfer_trtllm"))
        cls.tensors = [tiny_llama_tensors(seed) for seed in range(2)]

    def setUp(self):
        self.directory = self.enterContext(tempfile.TemporaryDirectory())

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name.replace(" ", "-"))

    def assert_holds(self, model, tensors) -> None:
        with mxfp8_checkpoint_form(model):
            held = dict(model.named_parameters())
            for name, tensor in fused_parameters(tensors).items():
                same = held[name].data.view(torch.uint8), tensor.view(torch.uint8)
                self.assertTrue(torch.equal(*same), name)


class TestLoading(FormatTestCase):
    def test_every_format_holds_the_same_bytes(self):
        for name, form in FORMATS.items():
            with self.subTest(name):
                path = with_format(self.path(name), self.tensors[0], **form)
                model = load_on_cpu(path)
                self.assert_holds(model, self.tensors[0])
                self.assertIsInstance(
                    model.model.layers[0].mlp.down_proj.quant_method, Fp8LinearMethod
                )

    def test_updates_take_both_names_whatever_was_loaded(self):
        own = write_checkpoint(self.path("own"), self.tensors[0])
        other = with_format(self.path("other"), self.tensors[0], modelopt())
        for path in own, other:
            model = load_on_cpu(path)
            for seed, suffix in ((1, "weight_scale"), (0, "weight_scale_inv")):
                with self.subTest(path=path, suffix=suffix):
                    model.load_weights(
                        (name.replace("weight_scale_inv", suffix), tensor)
                        for name, tensor in self.tensors[seed].items()
                    )
                    self.assert_holds(model, self.tensors[seed])

    def test_scales_as_float8_e8m0fnu(self):
        tensors = {
            name: t.view(torch.float8_e8m0fnu) if "scale" in name else t
            for name, t in self.tensors[0].items()
        }
        path = with_format(self.path("e8m0"), tensors, modelopt())
        self.assert_holds(load_on_cpu(path), self.tensors[0])

    def mixed(self, *parts: str) -> dict:
        """Checkpoint 0 with these layers in bf16 and without scales."""
        names = tuple(f".{part}.weight_scale_inv" for part in parts)
        tensors = {n: t for n, t in self.tensors[0].items() if not n.endswith(names)}
        generator = torch.Generator().manual_seed(5)
        for name in tensors:
            if name.endswith(tuple(f".{part}.weight" for part in parts)):
                values = torch.randn(tensors[name].shape, generator=generator)
                tensors[name] = (values / 20).bfloat16()
        return tensors

    def test_mixed_checkpoints_are_served_mixed(self):
        parts = "q_proj", "k_proj", "v_proj"
        tensors = self.mixed(*parts)
        names = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in parts]
        own = {**TINY_LLAMA["quantization_config"], "modules_to_not_convert": names}
        for name, form in {
            "own": dict(quantization=own),
            "globs": dict(
                quantization=modelopt(ignore=["*.q_proj*", "*k_proj", "*v_proj"])
            ),
            "regular expressions": dict(
                quantization=compressed_tensors(ignore=["re:.*self_attn.[qkv]_proj$"])
            ),
        }.items():
            with self.subTest(name):
                model = load_on_cpu(with_format(self.path(name), tensors, **form))
                attention = model.model.layers[1].self_attn
                self.assertEqual(attention.qkv_proj.weight.dtype, torch.bfloat16)
                self.assertEqual(attention.o_proj.weight.dtype, torch.float8_e4m3fn)
                self.assert_holds(model, tensors)

    def test_where_the_model_cannot_be_asked_layers_go_by_their_prefixes(self):
        parts = [f"layers.1.self_attn.{part}_proj" for part in "qkv"]
        config = modelopt(ignore=[f"model.{part}" for part in parts])
        path = with_format(self.path("asked"), self.mixed(*parts), config)
        with mock.patch.object(names, "ask_model", side_effect=KeyError("x")):
            with self.assertLogs(names.logger, "WARNING"):
                model = load_on_cpu(path)
        attention = model.model.layers[1].self_attn
        self.assertEqual(attention.qkv_proj.weight.dtype, torch.bfloat16)

    def test_a_model_that_is_built_otherwise_than_asked(self):
        choose = Mxfp8Plan([("model.a", True)]).chooser()
        with self.assertRaisesRegex(ValueError, "model.b is built where model.a was"):
            choose(None, "model.b")

    def test_a_list_with_a_part_of_a_fused_layer_is_refused(self):
        part = "model.layers.1.self_attn.k_proj"
        path = with_format(
            self.path("part"), self.mixed("k_proj"), modelopt(ignore=[part])
        )
        with self.assertRaisesRegex(
            ValueError, rf"layers.1.self_attn.qkv_proj is one layer.*{part} not"
        ):
            load_on_cpu(path)

    def test_an_fp8_cache_and_its_scales(self):
        scales = {
            f"model.layers.{i}.self_attn.{part}_proj.{part}_scale": torch.tensor(0.25)
            for i in range(2)
            for part in "kv"
        }
        path = with_format(
            self.path("cache"),
            {**self.tensors[0], **scales},
            modelopt(kv_cache_scheme=FP8_CACHE),
        )
        model = load_on_cpu(path)
        self.assertEqual(model.model.layers[1].self_attn.attn.k_scale.item(), 0.25)
        self.assertEqual(ModelConfig(path).kv_cache_quant_algo, "FP8")


class TestRefusals(FormatTestCase):
    """At start, by the checkpoint's own name of the tensor, before weights are read."""

    scale = "model.layers.1.self_attn.k_proj.weight_scale"
    weight = "model.layers.1.self_attn.k_proj.weight"

    def assert_refused(self, message, changes, quantization=None) -> None:
        tensors = {**self.tensors[0], **changes}
        tensors = {name: t for name, t in tensors.items() if t is not None}
        # sglang caches a path's config.
        path = tempfile.mkdtemp(dir=self.directory)
        with_format(path, tensors, quantization or modelopt())
        with mock.patch.object(DefaultModelLoader, "_get_weights_iterator") as read:
            with self.assertRaisesRegex(ValueError, message):
                load_on_cpu(path)
            read.assert_not_called()

    def test_scales(self):
        good = self.tensors[0][f"{self.scale}_inv"]
        swizzled = swizzle_scale(good, shuffle=False)
        for message, scale in {
            f"lacks the scale of {self.weight}": None,
            rf"{self.scale} .*is \[64, 16\], got \[2048\]: it looks swizzled": swizzled,
            rf"{self.scale} .*is \[64, 16\], got \[64, 8\]": good[:, :8].contiguous(),
            f"{self.scale} holds torch.uint8, got torch.float32": good.float(),
        }.items():
            with self.subTest(message):
                self.assert_refused(message, {f"{self.scale}_inv": scale})

    def test_a_scale_without_its_weight(self):
        self.assert_refused(
            "does not fill .*layers.1.self_attn.qkv_proj.weight", {self.weight: None}
        )

    def test_bf16_where_mxfp8_is_declared(self):
        weight = self.tensors[0][self.weight].to(torch.bfloat16)
        self.assert_refused(
            f"{self.weight} holds torch.float8_e4m3fn, got torch.bfloat16.*list the layer",
            {self.weight: weight, f"{self.scale}_inv": None},
        )

    def test_mxfp8_where_bf16_is_declared(self):
        config = modelopt(ignore=["*.k_proj", "*.q_proj", "*.v_proj"])
        self.assert_refused(r"_proj.weight is torch.float8_e4m3fn, but", {}, config)
        embedding = self.tensors[0]["model.embed_tokens.weight"]
        self.assert_refused(
            "embed_tokens.weight is torch.float8_e4m3fn, but its layer is not quantized",
            {
                "model.embed_tokens.weight": embedding.to(torch.float8_e4m3fn),
                "model.embed_tokens.weight_scale_inv": torch.ones(1),
            },
        )

    def test_configs(self):
        mixed = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "MXFP8"}}
        changes = dict(quant_algo="MIXED_PRECISION", quantized_layers=mixed)
        for message, form in {
            "AutoRound": dict(
                quantization={
                    "quant_method": "auto-round",
                    "data_type": "mx_fp",
                    "bits": 8,
                }
            ),
            "MIXED_PRECISION of FP8, MXFP8 is": dict(quantization=modelopt(**changes)),
            "MIXED_PRECISION of FP8, MXFP8": dict(
                files={"hf_quant_config.json": hf_quant_config(**changes)}
            ),
        }.items():
            path = with_format(tempfile.mkdtemp(dir=self.directory), {}, **form)
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                ModelConfig(path)

    def test_what_the_model_does_not_take_is_no_reason(self):
        extra = self.tensors[0][self.weight]
        tensors = {**self.tensors[0], "model.mtp.fc.weight": extra.clone()}
        path = with_format(self.path("extra"), tensors, modelopt())
        index = {"weight_map": {"model.rotary.inv_freq": "model.safetensors"}}
        names = {name.replace("_inv", ""): "model.safetensors" for name in tensors}
        index["weight_map"].update(names)
        Path(path, "model.safetensors.index.json").write_text(json.dumps(index))
        self.assert_holds(load_on_cpu(path), self.tensors[0])

    def test_experts_where_they_cannot_run(self):
        config = Fp8Config(is_checkpoint_fp8_serialized=True, use_mxfp8=True)
        for sm100, cutlass in ((False, True), (True, False)):
            backend = mock.Mock(**{"is_cutlass.return_value": cutlass})
            with contextlib.ExitStack() as stack:
                patch = lambda *args, **kw: stack.enter_context(
                    mock.patch.object(fp8, *args, **kw)
                )
                patch("is_sm100_supported", return_value=sm100)
                patch("get_moe_runner_backend", return_value=backend)
                with self.assertRaisesRegex(
                    ValueError,
                    "^model.layers.3.mlp.experts: MXFP8 experts run on SM100",
                ):
                    config._require_mxfp8_experts("model.layers.3.mlp.experts")


class TestFlags(FormatTestCase):
    def quantization(self, form: dict, flag) -> str:
        path = tempfile.mkdtemp(dir=self.directory)
        with_format(path, self.tensors[0], **form)
        return ModelConfig(path, quantization=flag).quantization

    def test_a_flag_may_name_the_format(self):
        for flag in (None, "modelopt", "modelopt_fp8", "mxfp8"):
            for name in FORMATS:
                if name == "compressed-tensors":
                    continue
                self.assertEqual(self.quantization(FORMATS[name], flag), "mxfp8")
        for flag in (None, "compressed-tensors", "mxfp8"):
            form = FORMATS["compressed-tensors"]
            self.assertEqual(self.quantization(form, flag), "mxfp8")

    def test_another_flag_is_refused(self):
        for flag in ("fp8", "awq", "compressed-tensors", "modelopt_fp4"):
            with self.assertRaisesRegex(ValueError, "does not match"):
                self.quantization(FORMATS["modelopt in config.json"], flag)

    def test_w8a16_needs_the_flag(self):
        group = {"targets": ["Linear"], "weights": MXFP8_SCHEME}
        form = dict(quantization=compressed_tensors(config_groups={"group_0": group}))
        with self.assertRaisesRegex(ValueError, "W8A16"):
            self.quantization(form, None)
        self.assertEqual(self.quantization(form, "mxfp8"), "mxfp8")

    def test_other_formats_with_a_checkpoint_format_stay_as_they_were(self):
        config = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
        }
        for flag in (None, "gptq"):
            self.assertNotEqual(
                self.quantization({"quantization": config}, flag), "mxfp8"
            )

    def test_other_modelopt_checkpoints_stay_as_they_were(self):
        form = dict(files={"hf_quant_config.json": hf_quant_config(quant_algo="FP8")})
        self.assertEqual(self.quantization(form, None), "modelopt_fp8")


if __name__ == "__main__":
    unittest.main()
