"""MXFP8 checkpoints as their writers write them, from the config to the loaded bytes."""

import json
import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from compressed_tensors import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    preset_name_to_scheme,
)

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.models.utils import WeightsMapper
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_checkpoints import (
    LAYERS,
    LINEARS,
    MXFP8,
    PARTS,
    SIZE,
    load_checkpoint,
    random_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="base-a-test-cpu")

# nvidia-modelopt 0.47.0, with the attention of layer 0 switched off.
MODELOPT = {
    "ignore": ["lm_head", "model.embed_tokens", "model.layers.0.self_attn*"],
    "quant_algo": "MXFP8",
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}
SIDECAR = {
    "producer": MODELOPT["producer"],
    "quantization": {
        "quant_algo": "MXFP8",
        "kv_cache_quant_algo": None,
        "group_size": 32,
        "exclude_modules": MODELOPT["ignore"],
    },
}
OWN = {**MXFP8, "modules_to_not_convert": ["mlp.gate", "*.0.self_attn.*"]}


def group(preset="MXFP8", targets=("Linear",)) -> dict:
    return json.loads(preset_name_to_scheme(preset, list(targets)).model_dump_json())


def compressed(group=group(), ignore=("lm_head",), **changes) -> dict:
    """As compressed-tensors writes it."""
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=CompressionFormat.mxfp8_quantized.value,
        quantization_status="compressed",
        ignore=list(ignore),
    )
    return {**json.loads(config.model_dump_json()), **changes}


def mixed(*algorithms: str) -> dict:
    layers = {LINEARS[i]: {"quant_algo": a} for i, a in enumerate(algorithms)}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


class TestMxfp8Formats(CustomTestCase):
    def write(self, quantization=None, sidecar=None, bf16=()) -> None:
        """A checkpoint that declares this, with the linears `bf16` as they are."""
        scales = {n: n.replace("_scale_inv", "_scale") for n in random_tensors()}
        self.tensors = {scales[n]: t for n, t in random_tensors().items()}
        for name in bf16:
            del self.tensors[f"{name}.weight_scale"]
            self.tensors[f"{name}.weight"] = torch.randn(SIZE, SIZE).bfloat16()
        directory = self.enterContext(TemporaryDirectory())
        self.path = write_checkpoint(directory, self.tensors, quantization)
        if sidecar:
            Path(self.path, "hf_quant_config.json").write_text(json.dumps(sidecar))

    def config(self, flag=None) -> ModelConfig:
        return ModelConfig(self.path, quantization=flag)

    def assert_loads(self, flag=None) -> None:
        """Every linear holds the checkpoint's bytes, in the checkpoint's dtype."""
        with mock.patch.object(DefaultModelLoader, "postprocess_weights"):
            model = load_checkpoint(self.path, flag)
        modules, held = dict(model.named_modules()), {}
        for layer in LAYERS:
            for name, parts in (
                ("self_attn.qkv_proj", PARTS[:3]),
                ("self_attn.o_proj", PARTS[3:4]),
                ("mlp.gate_up_proj", PARTS[4:6]),
                ("mlp.down_proj", PARTS[6:]),
            ):
                linear = modules[f"{layer}.{name}"]
                for i, part in enumerate(f"{layer}.{part}" for part in parts):
                    rows = slice(SIZE * i, SIZE * i + SIZE)
                    held[f"{part}.weight"] = linear.weight[rows]
                    if isinstance(linear.quant_method, Fp8LinearMethod):
                        scale = linear.weight_scale_inv[rows]
                        held[f"{part}.weight_scale"] = scale
        for name, tensor in held.items():
            expected = self.tensors[name]
            self.assertEqual(tensor.dtype, expected.dtype, name)
            got, expected = (
                t.contiguous().view(torch.uint8) for t in (tensor, expected)
            )
            self.assertTrue(torch.equal(got, expected), name)
        scales = [name for name in self.tensors if name.endswith("_scale")]
        self.assertLessEqual(set(scales), set(held))

    def test_hf_quant_config_alone(self):
        everything = {**SIDECAR["quantization"], "exclude_modules": ["lm_head"]}
        self.write(sidecar={**SIDECAR, "quantization": everything})
        for flag in (None, "modelopt", "mxfp8"):
            with self.subTest(flag=flag):
                self.assert_loads(flag)

    def test_globs(self):
        for config, sidecar in ((MODELOPT, None), (None, SIDECAR), (OWN, None)):
            with self.subTest(config=config):
                self.write(config, sidecar, bf16=LINEARS[:4])
                self.assert_loads()

    def test_compressed_tensors(self):
        mlps = [name for name in LINEARS if ".mlp." in name]
        attention = [name for name in LINEARS if name not in mlps]
        targets = ["re:.*self_attn.*", *LINEARS[-3:]]
        for config, bf16, *flags in (
            (compressed(), [], None, "compressed-tensors", "mxfp8"),
            (compressed(ignore=["lm_head", "re:.*self_attn.*"]), attention, None),
            (compressed(ignore=["lm_head", *LINEARS[:4]]), LINEARS[:4], None),
            (compressed(group(targets=targets)), LINEARS[4:7], None),
            (compressed(group("MXFP8A16")), [], "mxfp8"),
        ):
            self.write(config, bf16=bf16)
            for flag in flags:
                with self.subTest(bf16=bf16, flag=flag):
                    self.assert_loads(flag)

    def test_an_fp8_cache_is_told(self):
        scheme = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
        scheme = json.loads(scheme.model_dump_json())
        self.write(compressed(kv_cache_scheme=scheme))
        told = self.config().hf_config.quantization_config
        self.assertEqual(Fp8Config.from_config(told).kv_cache_quant_algo, "FP8")

    def test_what_is_not_served_is_refused_by_name(self):
        two = {"group_0": group(), "other": group("W8A8", ["re:.*mlp"])}
        auto_round = {"quant_method": "auto-round", "data_type": "mx_fp", "bits": 8}
        of_two = mixed("FP8", "MXFP8")
        for reason, config, sidecar in (
            ("W8A16 .*--quantization mxfp8", compressed(group("MXFP8A16")), None),
            (r"other formats \(other\)", compressed(config_groups=two), None),
            ("transform_config", compressed(transform_config={"u": {}}), None),
            ("AutoRound's MXFP8", auto_round, None),
            ("MIXED_PRECISION of FP8, MXFP8", {**MODELOPT, **of_two}, None),
            ("MIXED_PRECISION of FP8, MXFP8", None, {"quantization": of_two}),
        ):
            self.write(config, sidecar)
            with self.subTest(reason), self.assertRaisesRegex(ValueError, reason):
                self.config()
        served = {**MODELOPT, **mixed("NVFP4", "MXFP8")}
        for config, flag, expected in (
            (served, None, "modelopt_mixed"),
            # This one reads the checkpoint's own config.
            (compressed(group("MXFP8A16")), "humming", "humming"),
        ):
            self.write(config)
            self.assertEqual(self.config(flag).quantization, expected)

    def test_a_part_of_a_fused_layer_is_refused(self):
        self.write({**MODELOPT, "ignore": ["model.layers.1.self_attn.k*"]})
        with self.assertRaisesRegex(ValueError, "k_proj not: quantize all or none"):
            self.assert_loads()

    def test_a_model_says_what_it_fuses(self):
        listed = ["glob:*.a_proj", "glob:*.b_proj"]
        fused = {"ab_proj": ["a_proj", "b_proj"]}
        self.assertTrue(is_layer_skipped("layers.0.ab_proj", listed, fused))

    def test_names_in_globs_are_mapped(self):
        listed = ["glob:tower.blocks.0*", "re:.*tower"]
        config = Fp8Config(True, ignored_layers=listed, use_mxfp8=True)
        config.apply_weight_name_mapper(
            WeightsMapper(orig_to_new_prefix={"tower.": "visual."})
        )
        self.assertEqual(config.ignored_layers, ["glob:visual.blocks.0*", "re:.*tower"])


if __name__ == "__main__":
    unittest.main()
