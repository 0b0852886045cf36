"""MXFP8 checkpoints of every format, from their config to a model that serves them.

Real configs, real upstream loaders, on a CPU, where FlashInfer's kernels are emulated. What
is refused of a checkpoint's tensors: rl/test_mxfp8_update_check.py.
"""

import json
import re
import unittest
from contextlib import nullcontext
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
    with_bf16,
    with_e8m0_scales,
    with_weight_scale,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="default")

MXFP8_SCHEME = dict(num_bits=8, type="float", strategy="group", group_size=32)
MXFP8_SCHEME |= dict(scale_dtype="torch.uint8", symmetric=True, dynamic=False)
W8A16 = {"targets": ["Linear"], "weights": MXFP8_SCHEME}
GROUP = {**W8A16, "input_activations": {**MXFP8_SCHEME, "dynamic": True}}
COMPRESSED = "compressed-tensors"
FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}
OWN = TINY_LLAMA["quantization_config"]
OWN_AS_FP8 = {**OWN, "quant_method": "fp8"}
BOTH_LISTS = dict(ignored_layers=["a", "b"], modules_to_not_convert=["b", "c"])
AUTO_ROUND = {"quant_method": "auto-round", "data_type": "mx_fp", "bits": 8}


def compressed(*targets, group=GROUP, **changes) -> dict:
    groups = {"g": {**group, "targets": list(targets or ["Linear"])}}
    own = dict(config_groups=groups, ignore=["lm_head"], kv_cache_scheme=None)
    return {"quant_method": COMPRESSED, **own, **changes}


def modelopt(**changes) -> dict:
    own = dict(quant_algo="MXFP8", ignore=["lm_head"])
    return {"quant_method": "modelopt", **own, **changes}


def mixed_modelopt(*algorithms: str) -> dict:
    layers = {f"layers.{i}": {"quant_algo": a} for i, a in enumerate(algorithms)}
    return dict(quant_algo="MIXED_PRECISION", quantized_layers=layers)


def hf_quant_config(**changes) -> dict:
    own = dict(quant_algo="MXFP8", group_size=32, exclude_modules=["lm_head"])
    own["kv_cache_quant_algo"] = None
    return {"producer": {"name": "modelopt"}, "quantization": {**own, **changes}}


class TestDescription(CustomTestCase):
    def test_every_format_becomes_one(self):
        head, fp8_cache = ["glob:lm_head"], {"kv_cache_quant_algo": "FP8"}
        flat = hf_quant_config(kv_cache_quant_algo="FP8")
        for config, name, ignored, cache in (
            (OWN, "mxfp8", [], {}),
            ({**OWN, **BOTH_LISTS}, "mxfp8", ["a", "b", "c"], {}),
            (OWN_AS_FP8, "mxfp8", [], {}),
            ({**OWN, "scale_fmt": "UE8M0"}, "mxfp8", [], {}),
            (modelopt(), "modelopt", head, {}),
            (modelopt(quant_algo="mxfp8"), "modelopt", head, {}),
            (modelopt(group_size=None), "modelopt", head, {}),
            (modelopt(kv_cache_scheme=FP8_CACHE), "modelopt", head, fp8_cache),
            (flat_modelopt_mxfp8(hf_quant_config()), "modelopt", head, {}),
            (flat_modelopt_mxfp8(flat), "modelopt", head, fp8_cache),
            (flat_modelopt_mxfp8(modelopt()), "modelopt", head, {}),
            (compressed(), COMPRESSED, head, {}),
            (compressed(kv_cache_scheme=FP8_CACHE), COMPRESSED, head, fp8_cache),
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
                    **cache,
                }
                self.assertEqual(describe_mxfp8(config), expected)
                self.assertEqual(describe_mxfp8(expected), expected)

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
        in_a_file = hf_quant_config(**mixed)
        for message, config in (
            (r"AutoRound's MXFP8 .* is not served. .*ModelOpt", AUTO_ROUND),
            ("ModelOpt MIXED_PRECISION of MXFP8, NVFP4 is not", modelopt(**mixed)),
            ("MIXED_PRECISION of MXFP8, NVFP4", flat_modelopt_mxfp8(in_a_file)),
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
        """Names that begin with a number are of layers in `model.layers`."""
        layers = LayerList(ignored)
        for name in kept + quantized:
            full = f"model.layers.{name}" if name[:1].isdigit() else name
            with self.subTest(name, ignored=ignored):
                self.assertEqual(layers.has_layer(full), name in quantized)

    def test_lists(self):
        own = ["model.layers.0.mlp.down_proj.weight", "*.1.self_attn.*", "re:.*o_proj"]
        own = describe_mxfp8({"quant_method": "mxfp8", "ignored_layers": own})
        globs = ["glob:model.layers.0.self_attn*", "glob:lm_head", "glob:mtp*"]
        wrapped = "language_model.model.layers.0.self_attn.o_proj"
        by_llm_compressor = ["glob:layers.0.mlp.up_proj.linear", "glob:*.linear"]
        from_start = ["re:.*self_attn.*", r"re:model\.layers\.0\."]
        for ignored, kept, quantized in (
            (
                globs,
                f"0.self_attn.qkv_proj {wrapped} lm_head model.mtp.layers.0.x",
                "0.mlp.down_proj 10.self_attn.o_proj model.lm_head_norm",
            ),
            (
                own["ignored_layers"],
                "0.mlp.down_proj 1.self_attn.qkv_proj 0.self_attn.o_proj",
                "0.self_attn.qkv_proj 1.mlp.down_proj",
            ),
            (
                by_llm_compressor,
                "0.mlp.up_proj 1.mlp.up_proj.linear",
                "1.mlp.up_proj 1.mlp.gate_proj",
            ),
            # A module is all its layers.
            (["glob:model.layers.1"], "1.mlp.gate_up_proj", "10.mlp.gate_up_proj"),
            (["glob:visual"], "visual.blocks.0.mlp.down_proj", ""),
            (
                from_start,
                "3.self_attn.qkv_proj 0.mlp.down_proj",
                "3.mlp.down_proj draft.model.layers.0.mlp.down_proj",
            ),
        ):
            self.assert_kept(ignored, kept.split(), quantized.split())
        # One layer has no name.
        self.assert_kept(["glob:lm_head", "re:.+"], [], [""])

    def test_targets_leave_the_rest(self):
        qkv, o = "0.self_attn.qkv_proj", "0.self_attn.o_proj"
        gate_up, other = "0.mlp.gate_up_proj", "1.mlp.gate_up_proj"
        parts = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
        named = ["re:.*mlp.*", f"model.layers.{o}"]
        for targets, ignore, kept, quantized in (
            (named, ["re:.*1.mlp.*"], [qkv, other], [gate_up, o]),
            ([r"re:.*self_attn\.(q|k|v|o)_proj$", *parts], [], [other], [qkv, gate_up]),
            ([r"re:.*qkv_proj$"], [], [gate_up], [qkv]),  # fused on disk
        ):
            described = describe_mxfp8(compressed(*targets, ignore=ignore))
            self.assert_kept(described["ignored_layers"], kept, quantized)

    def test_fused_layers(self):
        """By their own name or by all their parts; a list of some of them is refused."""
        experts = "experts.0.gate_proj experts.0.up_proj experts.0.down_proj"
        for fused, parts in (
            ("self_attn.qkv_proj", "q_proj k_proj v_proj"),
            ("mlp.gate_up_proj", "gate_proj up_proj"),
            ("self_attn.fused_qkv_a_proj_with_mqa", "q_a_proj kv_a_proj_with_mqa"),
            ("mlp.experts", experts),
            ("mlp.experts", "experts.0.w1 experts.0.w2 experts.0.w3"),
        ):
            parent = f"model.layers.0.{fused.split('.')[0]}"
            parts = [f"{parent}.{part}" for part in parts.split()]
            fused, another, last = f"model.layers.0.{fused}", f"2.{fused}", parts[-1]
            for kind in ("", "glob:", "re:"):
                self.assert_kept([f"{kind}{fused}"], [fused], [another])
                self.assert_kept([f"{kind}{p}" for p in parts], [fused], [another])
                for some in f"{kind}{last}", f"re:.*{re.escape(last[-6:])}$":
                    reason = f"{fused} is one layer.*{last} not: "
                    with self.subTest(some), self.assertRaisesRegex(ValueError, reason):
                        LayerList([some]).has_layer(fused)
        experts = "model.layers.3.mlp.experts"
        modules = [f"{experts}.{i}.{p}_proj" for i in range(9) for p in ("gate", "up")]
        with self.assertRaisesRegex(ValueError, f"{experts} is one layer.*, ... in"):
            LayerList([f"glob:{experts}.5.gate_proj"]).has_layer(experts, modules)


NO_METHOD = {k: v for k, v in modelopt().items() if k != "quant_method"}
# What declares a checkpoint's format: `quantization_config` and files beside config.json.
HF_FILE = "hf_quant_config.json"
FORMATS = {
    "modelopt": (modelopt(), {}),
    "modelopt without a method": (NO_METHOD, {}),
    HF_FILE: (None, {HF_FILE: hf_quant_config()}),
    COMPRESSED: (compressed(), {}),
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
    def test_every_format_holds_the_same_bytes_and_takes_both_names_of_a_scale(self):
        paths = {name: self.write_as(*form) for name, form in FORMATS.items()}
        paths["e8m0"] = self.write_as(modelopt(), tensors=with_e8m0_scales(self.a))
        for name, path in {**paths, "own": self.path_a}.items():
            with self.subTest(name):
                model = load_on_cpu(path)
                self.assert_serves(model, self.a)
                down = model.model.layers[0].mlp.down_proj
                self.assertIsInstance(down.quant_method, Fp8LinearMethod)
                model.load_weights(with_weight_scale(self.b).items())
                self.assert_updates(model)

    def test_mixed_checkpoints_are_served_mixed(self):
        """Also where the model cannot be asked: layers go by their prefixes."""
        parts = "q_proj", "k_proj", "v_proj"
        tensors = with_bf16(self.a, *parts)
        listed = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in parts]
        cannot_ask = mock.patch.object(names, "ask_model", side_effect=KeyError("x"))
        for quantization, asking in (
            ({**OWN, "modules_to_not_convert": listed}, nullcontext()),
            (modelopt(ignore=["*.q_proj*", "*k_proj", "*v_proj"]), nullcontext()),
            (compressed(ignore=["re:.*self_attn.[qkv]_proj$"]), nullcontext()),
            (modelopt(ignore=listed), cannot_ask),
        ):
            with self.subTest(quantization=quantization), asking as ask:
                path = self.write_as(quantization, tensors=tensors)
                with self.assertLogs(names.logger, "WARNING") if ask else nullcontext():
                    model = load_on_cpu(path)
                self.assert_serves(model, tensors)
                qkv = model.model.layers[1].self_attn.qkv_proj
                self.assertEqual(qkv.weight.dtype, torch.bfloat16)

    def test_a_model_that_is_built_otherwise_than_asked(self):
        choose = Mxfp8Plan([("model.a", True)]).chooser()
        with self.assertRaisesRegex(ValueError, "model.b is built where model.a was"):
            choose(None, "model.b")

    def test_experts_where_they_cannot_run(self):
        layer = "model.layers.3.mlp.experts"
        for sm100, cutlass in ((False, True), (True, False)):
            backend = mock.Mock(**{"is_cutlass.return_value": cutlass})
            with (
                mock.patch.object(fp8, "is_sm100_supported", return_value=sm100),
                mock.patch.object(fp8, "get_moe_runner_backend", return_value=backend),
                self.assertRaisesRegex(ValueError, f"^{layer}: MXFP8 experts run on"),
            ):
                mxfp8_config()._require_mxfp8_experts(layer)


class TestFlags(FormatTestCase):
    """What ModelConfig makes of a checkpoint and of --quantization."""

    def test_what_becomes_of_it(self):
        gptq = dict(quant_method="gptq", bits=4, group_size=128, desc_act=False)
        gptq |= dict(sym=True, checkpoint_format="gptq")
        fp8_file = {HF_FILE: hf_quant_config(quant_algo="FP8")}
        by_modelopt = None, "mxfp8", "modelopt", "modelopt_fp8"
        for expected, form, *flags in (
            *(("mxfp8", FORMATS[name], *by_modelopt) for name in [*FORMATS][:3]),
            ("mxfp8", FORMATS[COMPRESSED], None, "mxfp8", COMPRESSED),
            ("mxfp8", (compressed(group=W8A16),), "mxfp8"),
            ("modelopt_fp8", (None, fp8_file), None),
            ("gptq", (gptq,), None, "gptq"),
        ):
            path = self.write_as(*form)
            for flag in flags:
                with self.subTest(form=form, flag=flag):
                    config = ModelConfig(path, quantization=flag)
                    found = config.quantization.removesuffix("_marlin")
                    self.assertEqual(found, expected)

    def test_an_fp8_cache_is_told(self):
        path = self.write_as(modelopt(kv_cache_scheme=FP8_CACHE))
        self.assertEqual(ModelConfig(path).kv_cache_quant_algo, "FP8")

    def test_a_flag_of_another_format_is_refused(self):
        path = self.write_as(modelopt())
        for flag in "fp8", "awq", COMPRESSED, "modelopt_fp4":
            with self.subTest(flag), self.assertRaisesRegex(ValueError, "not match"):
                ModelConfig(path, quantization=flag)


if __name__ == "__main__":
    unittest.main()
