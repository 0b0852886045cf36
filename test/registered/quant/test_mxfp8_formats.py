"""MXFP8 checkpoints of every format, from their config to a model that serves them.

Real configs, real upstream loaders, on a CPU, where FlashInfer's kernels are emulated. What
is refused of a checkpoint's tensors: rl/test_mxfp8_update_check.py.
"""

import json
import re
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.mxfp8 import names
from sglang.srt.layers.quantization.mxfp8.formats import (
    LayerList,
    describe_mxfp8,
    flat_modelopt_mxfp8,
)
from sglang.srt.layers.quantization.mxfp8.names import Mxfp8Plan
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TINY_LLAMA,
    TinyModelTestCase,
    load_on_cpu,
    mxfp8_config,
    with_weight_scale,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="default")

MXFP8_SCHEME = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "symmetric": True,
    "dynamic": False,
}
W8A16 = {"targets": ["Linear"], "weights": MXFP8_SCHEME}
GROUP = {**W8A16, "input_activations": {**MXFP8_SCHEME, "dynamic": True}}
FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}
OWN = TINY_LLAMA["quantization_config"]
OWN_AS_FP8 = {**OWN, "quant_method": "fp8"}
AUTO_ROUND = {"quant_method": "auto-round", "data_type": "mx_fp", "bits": 8}


def compressed(*targets, group=GROUP, **changes) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp8-quantized",
        "config_groups": {"g": {**group, "targets": list(targets or ["Linear"])}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **changes,
    }


def modelopt(**changes) -> dict:
    weights = {"num_bits": 8, "group_size": 32, "type": "float"}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MXFP8",
        "config_groups": {"group_0": {"weights": weights}},
        "ignore": ["lm_head"],
        **changes,
    }


def mixed_modelopt(*algorithms: str) -> dict:
    layers = {f"layers.{i}": {"quant_algo": a} for i, a in enumerate(algorithms)}
    return dict(quant_algo="MIXED_PRECISION", quantized_layers=layers)


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
        for config, name, ignored in (
            (OWN, "mxfp8", []),
            ({**OWN, "modules_to_not_convert": ["lm_head"]}, "mxfp8", ["lm_head"]),
            (OWN_AS_FP8, "mxfp8", []),
            ({**OWN, "scale_fmt": "UE8M0"}, "mxfp8", []),
            (modelopt(), "modelopt", ["glob:lm_head"]),
            (modelopt(quant_algo="mxfp8"), "modelopt", ["glob:lm_head"]),
            (modelopt(group_size=None), "modelopt", ["glob:lm_head"]),
            (flat_modelopt_mxfp8(hf_quant_config()), "modelopt", ["glob:lm_head"]),
            (flat_modelopt_mxfp8(modelopt()), "modelopt", ["glob:lm_head"]),
            (compressed(), "compressed-tensors", ["glob:lm_head"]),
        ):
            with self.subTest(config=config):
                expected = {
                    **config,
                    "quant_method": "mxfp8",
                    "activation_scheme": "dynamic",
                    "weight_block_size": [1, 32],
                    "scale_fmt": "ue8m0",
                    "mxfp8_format": name,
                    "ignored_layers": ignored,
                }
                self.assertEqual(describe_mxfp8(config), expected)
                self.assertEqual(describe_mxfp8(expected), expected)

    def test_both_lists_of_our_own_form_count(self):
        lists = dict(ignored_layers=["a", "b"], modules_to_not_convert=["b", "c"])
        described = describe_mxfp8({"quant_method": "mxfp8", **lists})
        self.assertEqual(described["ignored_layers"], ["a", "b", "c"])

    def test_an_fp8_cache_is_told(self):
        for config in (
            modelopt(kv_cache_scheme=FP8_CACHE),
            flat_modelopt_mxfp8(hf_quant_config(kv_cache_quant_algo="FP8")),
            compressed(kv_cache_scheme=FP8_CACHE),
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
            modelopt(quant_algo="FP8"),
            modelopt(quant_algo="NVFP4"),
            modelopt(**mixed_modelopt("W4A8_AWQ")),
            {"quant_method": "auto-round", "data_type": "int", "bits": 4},
            {"quant_method": "awq"},
            compressed(group={"weights": fp8_scheme}),
        ):
            with self.subTest(config=config):
                self.assertIsNone(describe_mxfp8(config))
        for changes in {"quant_algo": "FP8"}, mixed_modelopt("FP8"):
            self.assertIsNone(flat_modelopt_mxfp8(hf_quant_config(**changes)))

    def test_what_is_not_served_is_refused_by_name(self):
        int8 = {"num_bits": 8, "type": "int"}
        two = {"g": GROUP, "h": {"targets": ["re:.*mlp"], "weights": int8}}
        of_outputs = {**GROUP, "output_activations": MXFP8_SCHEME}
        mixed = mixed_modelopt("NVFP4", "MXFP8")
        for message, config in (
            (r"AutoRound's MXFP8 .* is not served. .*ModelOpt", AUTO_ROUND),
            ("ModelOpt MIXED_PRECISION of MXFP8, NVFP4 is not", modelopt(**mixed)),
            ("group_size 16", modelopt(group_size=16)),
            ("kv_cache_quant_algo 'NVFP4'", modelopt(kv_cache_quant_algo="NVFP4")),
            ("kv_cache_scheme .*'int'.* is not", compressed(kv_cache_scheme=int8)),
            ('is MXFP8 only if .*"scale_fmt"', {**OWN_AS_FP8, "scale_fmt": None}),
            ("with a transform_config is not", compressed(transform_config={"u": {}})),
            ("with a sparsity_config is not", compressed(sparsity_config={"u": 1})),
            (r"with output_activations \(g\)", compressed(group=of_outputs)),
            ("'LlamaAttention' names a class", compressed("LlamaAttention")),
            (r"MXFP8 and other formats \(h\)", compressed(config_groups=two)),
            ("W8A16.*--quantization mxfp8", compressed(group=W8A16)),
            ("activation_scheme 'static'", {**OWN, "activation_scheme": "static"}),
            (r"weight_block_size \[128", {**OWN, "weight_block_size": [128, 128]}),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                describe_mxfp8(config)
        with self.assertRaisesRegex(ValueError, 'no "quantization", only producer'):
            flat_modelopt_mxfp8({"producer": {"name": "modelopt"}})


class TestLayerNames(CustomTestCase):
    """Which of sglang's layers a checkpoint's list keeps, and which are in MXFP8."""

    def assert_kept(self, ignored: list, kept: list, quantized: list) -> None:
        with self.subTest(ignored=ignored):
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

    def test_lists(self):
        own = ["model.layers.0.mlp.down_proj.weight", "*.1.self_attn.*", "re:.*o_proj"]
        config = {"quant_method": "mxfp8", "ignored_layers": own}
        wrapped = [
            "glob:layers.0.mlp.up_proj.linear",
            "glob:*.linear",
        ]  # llm-compressor
        for ignored, kept, quantized in (
            (
                describe_mxfp8(config)["ignored_layers"],
                ["0.mlp.down_proj", "1.self_attn.qkv_proj", "0.self_attn.o_proj"],
                ["0.self_attn.qkv_proj", "1.mlp.down_proj"],
            ),
            (
                wrapped,
                ["0.mlp.up_proj", "1.mlp.up_proj.linear"],
                ["1.mlp.up_proj", "1.mlp.gate_proj"],
            ),
            # A module is all its layers.
            (["glob:model.layers.1"], ["1.mlp.gate_up_proj"], ["10.mlp.gate_up_proj"]),
            (
                ["re:.*self_attn.*", r"re:model\.layers\.0\."],
                ["3.self_attn.qkv_proj", "0.mlp.down_proj"],
                ["3.mlp.down_proj"],
            ),
        ):
            kept, quantized = (
                [f"model.layers.{name}" for name in names]
                for names in (kept, quantized)
            )
            self.assert_kept(ignored, kept, quantized)
        # Regular expressions match from the start; one layer has no name.
        from_start = "draft.model.layers.0.mlp.down_proj"
        self.assert_kept([r"re:model\.layers\.0\."], [], [from_start])
        self.assert_kept(["glob:lm_head", "re:.+"], [], [""])
        self.assert_kept(["glob:visual"], ["visual.blocks.0.mlp.down_proj"], [])

    def test_targets_leave_the_rest(self):
        qkv, o = (f"model.layers.0.self_attn.{name}_proj" for name in ("qkv", "o"))
        mlps = [f"model.layers.{i}.mlp" for i in range(2)]
        gate_up, other = (f"{mlp}.gate_up_proj" for mlp in mlps)
        parts = [f"{mlps[0]}.gate_proj", f"{mlps[0]}.up_proj"]
        for targets, ignore, kept, quantized in (
            (["re:.*mlp.*", o], ["re:.*1.mlp.*"], [qkv, other], [gate_up, o]),
            ([r"re:.*self_attn\.(q|k|v|o)_proj$", *parts], [], [other], [qkv, gate_up]),
            ([r"re:.*qkv_proj$"], [], [gate_up], [qkv]),  # fused on disk
        ):
            described = describe_mxfp8(compressed(*targets, ignore=ignore))
            self.assert_kept(described["ignored_layers"], kept, quantized)

    def test_fused_layers(self):
        """By their own name or by all their parts; a list of some of them is refused."""
        attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
        for fused, *parts in (
            (f"{attention}.qkv_proj", "q_proj", "k_proj", "v_proj"),
            (f"{mlp}.gate_up_proj", "gate_proj", "up_proj"),
            (
                f"{attention}.fused_qkv_a_proj_with_mqa",
                *("q_a_proj", "kv_a_proj_with_mqa"),
            ),
            (
                f"{mlp}.experts",
                *("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj"),
            ),
            (f"{mlp}.experts", "experts.0.w1", "experts.0.w2", "experts.0.w3"),
        ):
            parent = fused.rpartition(".")[0]
            parts = [f"{parent}.{part}" for part in parts]
            for kind in ("", "glob:", "re:"):
                another = fused.replace(".0.", ".2.")
                self.assert_kept([f"{kind}{fused}"], [fused], [another])
                self.assert_kept([f"{kind}{p}" for p in parts], [fused], [another])
                last = parts[-1]
                for some in f"{kind}{last}", f"re:.*{re.escape(last[-6:])}$":
                    reason = f"{fused} is one layer.*{last} not: "
                    with self.subTest(some), self.assertRaisesRegex(ValueError, reason):
                        LayerList([some]).has_layer(fused)

    def test_one_expert_of_many(self):
        experts = "model.layers.3.mlp.experts"
        modules = [f"{experts}.{i}.{p}_proj" for i in range(9) for p in ("gate", "up")]
        with self.assertRaisesRegex(ValueError, f"{experts} is one layer.*, ... in"):
            LayerList([f"glob:{experts}.5.gate_proj"]).has_layer(experts, modules)


# What declares a checkpoint's format: `quantization_config` and files beside config.json.
FORMATS = {
    "modelopt": (modelopt(), {}),
    "modelopt without a method": (
        {k: v for k, v in modelopt().items() if k != "quant_method"},
        {},
    ),
    "hf_quant_config.json": (None, {"hf_quant_config.json": hf_quant_config()}),
    "compressed-tensors": (compressed(), {}),
}


class FormatTestCase(TinyModelTestCase):
    def write_as(self, quantization, files=(), tensors=None) -> str:
        """Checkpoint a, or `tensors`, with `weight_scale` and what declares its format."""
        tensors = with_weight_scale(self.a if tensors is None else tensors)
        path = self.write(tensors, quantization_config=quantization)
        for name, content in dict(files).items():
            Path(path, name).write_text(json.dumps(content))
        return path


class TestLoading(FormatTestCase):
    def test_every_format_holds_the_same_bytes(self):
        for name, form in FORMATS.items():
            with self.subTest(name):
                model = load_on_cpu(self.write_as(*form))
                self.assert_serves(model, self.a)
                down = model.model.layers[0].mlp.down_proj
                self.assertIsInstance(down.quant_method, Fp8LinearMethod)

    def test_updates_take_both_names_whatever_was_loaded(self):
        for path in self.path_a, self.write_as(modelopt()):
            model = load_on_cpu(path)
            model.load_weights(with_weight_scale(self.b).items())
            self.assert_serves(model, self.b)
            self.assert_updates(model)

    def test_scales_as_float8_e8m0fnu(self):
        tensors = {
            name: t.view(torch.float8_e8m0fnu) if "scale" in name else t
            for name, t in self.a.items()
        }
        path = self.write_as(modelopt(), tensors=tensors)
        self.assert_serves(load_on_cpu(path), self.a)

    def with_bf16(self, *layers: str) -> dict:
        """Checkpoint a with these layers in bf16 and without scales."""
        tensors = dict(self.a)
        for name in self.a:
            layer, _, last = name.rpartition(".")
            if layer.endswith(layers):
                weight = tensors.pop(name)
                if last == "weight":
                    tensors[name] = (weight.float() / 448).bfloat16()
        return tensors

    def assert_qkv_is_bf16(self, model, tensors) -> None:
        self.assert_serves(model, tensors)
        qkv = model.model.layers[1].self_attn.qkv_proj
        self.assertEqual(qkv.weight.dtype, torch.bfloat16)

    def test_mixed_checkpoints_are_served_mixed(self):
        parts = "q_proj", "k_proj", "v_proj"
        tensors = self.with_bf16(*parts)
        listed = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in parts]
        for quantization in (
            {**OWN, "modules_to_not_convert": listed},
            modelopt(ignore=["*.q_proj*", "*k_proj", "*v_proj"]),
            compressed(ignore=["re:.*self_attn.[qkv]_proj$"]),
        ):
            with self.subTest(quantization=quantization):
                model = load_on_cpu(self.write_as(quantization, tensors=tensors))
                self.assert_qkv_is_bf16(model, tensors)

    def test_where_the_model_cannot_be_asked_layers_go_by_their_prefixes(self):
        layers = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
        tensors = self.with_bf16(*layers)
        path = self.write_as(modelopt(ignore=layers), tensors=tensors)
        with mock.patch.object(names, "ask_model", side_effect=KeyError("x")):
            with self.assertLogs(names.logger, "WARNING"):
                self.assert_qkv_is_bf16(load_on_cpu(path), tensors)

    def test_a_model_that_is_built_otherwise_than_asked(self):
        choose = Mxfp8Plan([("model.a", True)]).chooser()
        with self.assertRaisesRegex(ValueError, "model.b is built where model.a was"):
            choose(None, "model.b")

    def test_an_fp8_cache_and_its_scales(self):
        scales = {
            f"model.layers.{i}.self_attn.{part}_proj.{part}_scale": torch.tensor(0.25)
            for i in range(2)
            for part in "kv"
        }
        config = modelopt(kv_cache_scheme=FP8_CACHE)
        path = self.write_as(config, tensors={**self.a, **scales})
        model = load_on_cpu(path)
        self.assertEqual(model.model.layers[1].self_attn.attn.k_scale.item(), 0.25)
        self.assertEqual(ModelConfig(path).kv_cache_quant_algo, "FP8")

    def test_what_does_not_fit_is_refused_by_the_checkpoints_names(self):
        part = "model.layers.1.self_attn.k_proj"
        scale = f"{part}.weight_scale"
        short = {f"{scale}_inv": self.a[f"{scale}_inv"][:, :8].contiguous()}
        for ignore, tensors, reason in (
            ([], {**self.a, **short}, rf"{scale} .*is \[64, 16\], got \[64, 8\]"),
            ([part], self.with_bf16(part), rf"qkv_proj is one layer.*{part} not"),
            (["*.[qkv]_proj"], self.a, r"_proj.weight is torch.float8_e4m3fn, but"),
        ):
            path = self.write_as(modelopt(ignore=ignore), tensors=tensors)
            with self.subTest(reason), self.assertRaisesRegex(ValueError, reason):
                load_on_cpu(path)

    def test_experts_where_they_cannot_run(self):
        layer = "model.layers.3.mlp.experts"
        reason = f"^{layer}: MXFP8 experts run on SM100"
        for sm100, cutlass in ((False, True), (True, False)):
            backend = mock.Mock(**{"is_cutlass.return_value": cutlass})
            with (
                mock.patch.object(fp8, "is_sm100_supported", return_value=sm100),
                mock.patch.object(fp8, "get_moe_runner_backend", return_value=backend),
                self.assertRaisesRegex(ValueError, reason),
            ):
                mxfp8_config()._require_mxfp8_experts(layer)


class TestFlags(FormatTestCase):
    """What --quantization makes of a checkpoint."""

    def assert_becomes(self, expected: str, form: tuple, *flags) -> None:
        path = self.write_as(*form)
        for flag in flags:
            config = ModelConfig(path, quantization=flag)
            self.assertEqual(config.quantization, expected, (form, flag))

    def test_a_flag_may_name_the_format(self):
        modelopt_flags = None, "modelopt", "modelopt_fp8", "mxfp8"
        for name, form in FORMATS.items():
            flags = modelopt_flags
            if name == "compressed-tensors":
                flags = None, "compressed-tensors", "mxfp8"
            self.assert_becomes("mxfp8", form, *flags)
        w8a16 = compressed(group=W8A16)
        self.assert_becomes("mxfp8", (w8a16,), "mxfp8")

    def test_what_is_refused(self):
        mixed = mixed_modelopt("FP8", "MXFP8")
        files = {"hf_quant_config.json": hf_quant_config(**mixed)}
        for reason, form, *flags in (
            ("AutoRound", (AUTO_ROUND,), None),
            ("MIXED_PRECISION of FP8, MXFP8 is", (modelopt(**mixed),), None),
            ("MIXED_PRECISION of FP8, MXFP8", (None, files), None),
            ("W8A16", (compressed(group=W8A16),), None),
            (
                "does not match",
                (modelopt(),),
                *("fp8", "awq", "compressed-tensors", "modelopt_fp4"),
            ),
        ):
            path = self.write_as(*form)
            for flag in flags:
                with self.subTest(reason, flag=flag):
                    with self.assertRaisesRegex(ValueError, reason):
                        ModelConfig(path, quantization=flag)

    def test_other_formats_stay_as_they_were(self):
        gptq = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
        }
        files = {"hf_quant_config.json": hf_quant_config(quant_algo="FP8")}
        self.assert_becomes("modelopt_fp8", (None, files), None)
        for flag in (None, "gptq"):
            config = ModelConfig(self.write_as(gptq), quantization=flag)
            self.assertNotEqual(config.quantization, "mxfp8")


if __name__ == "__main__":
    unittest.main()
