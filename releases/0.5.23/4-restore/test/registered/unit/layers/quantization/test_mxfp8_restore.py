"""What trtllm serves after updates of MXFP8 weights. No kernel runs."""

import unittest
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import flashinfer
import torch
from safetensors.torch import save_file

from sglang.kernels.ops.speculative.dspark.dspark_draft_model import (
    _build_stacked_wkv_weight,
)
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_linears import interleave, make_linear, on_gpu, random_mxfp8
from sglang.test.mxfp8_updates import updater_of
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="base-a-test-cpu")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = {"a": (256, 256), "b": (160, 512)}  # one in whole tiles of 128 rows, one not


def tensors(seed: int) -> dict:
    found = {}
    for name, (n, k) in SHAPES.items():
        weight, scale = random_mxfp8(n, k, seed)
        found |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scale}
    return found


OLD, NEW = tensors(1), tensors(2)
BAD = {"b.weight": torch.zeros(3, 5)}


def shuffled(weight: torch.Tensor, scale: torch.Tensor) -> list:
    """What trtllm reads, by FlashInfer's own functions: the weight and the scale."""
    padded = torch.zeros(-(-len(scale) // 128) * 128, scale.shape[1], dtype=torch.uint8)
    padded[: len(scale)] = scale
    rows = flashinfer.shuffle_matrix_a(weight.view(torch.uint8), 128)
    return [rows, flashinfer.shuffle_matrix_sf_a(padded, 128, num_elts_per_sf=32)]


def held(model: torch.nn.Module) -> dict:
    """A copy of the bytes of every parameter."""
    return {n: p.view(torch.uint8).clone() for n, p in model.named_parameters()}


class Model(torch.nn.Module):
    def __init__(self, serialized: bool):
        super().__init__()
        for name, (n, k) in SHAPES.items():
            setattr(self, name, make_linear(n, k, serialized=serialized))

    def load_weights(self, weights):
        for name, tensor in weights:
            param = self.get_parameter(name)
            param.weight_loader(param, tensor)


class TestMxfp8Restore(CustomTestCase):
    def build(self, served=OLD, backend="flashinfer_trtllm", serialized=True) -> None:
        """A loaded model, and its updater."""
        self.enterContext(on_gpu(100, backend))
        self.model = Model(serialized)
        DefaultModelLoader.load_weights_and_postprocess(self.model, served.items(), CPU)
        self.config = SimpleNamespace(
            model_path="",
            revision=None,
            dtype=BF16,
            hf_config=SimpleNamespace(architectures=["Model"], model_type=""),
            quantization=None,
        )
        self.updater = self.enterContext(updater_of(self.model, self.config))

    def update(self, sent: dict, run_post_load: bool) -> bool:
        """Whether a session took them."""
        self.updater.begin_weight_update()
        done, _ = self.updater.load_weights_from_distributed(list(sent.items()))
        self.updater.end_weight_update(run_post_load=run_post_load)
        return done

    def assert_serves(self, expected: dict) -> None:
        for name, layer in self.model.named_children():
            want = shuffled(
                expected[f"{name}.weight"], expected[f"{name}.weight_scale_inv"]
            )
            found = layer.weight.view(torch.uint8), layer.weight_scale_inv_shuffled
            for one, other in zip(found, want):
                self.assertTrue(torch.equal(one.flatten(), other.flatten()), name)

    def test_there_and_back(self):
        self.build()
        places = {n: p.data_ptr() for n, p in self.model.named_parameters()}
        self.assert_serves(OLD)
        for _ in range(2):
            for _ in range(2):
                DefaultModelLoader.restore_weights_before_loading(self.model, CPU)
            found = held(self.model)
            for name, tensor in OLD.items():
                self.assertTrue(torch.equal(found[name], tensor.view(torch.uint8)))
            for _ in range(2):
                DefaultModelLoader.postprocess_weights(self.model, CPU)
            self.assert_serves(OLD)
        found = {n: p.data_ptr() for n, p in self.model.named_parameters()}
        self.assertEqual(found, places)

    def test_one_copy_of_the_scale(self):
        self.build()
        for layer in self.model.children():
            scale, kernel = layer.weight_scale_inv, layer.weight_scale_inv_shuffled
            self.assertEqual(scale.data_ptr(), kernel.data_ptr())
            size = scale.untyped_storage().nbytes()
            self.assertEqual(size, -(-len(scale) // 128) * 128 * scale.shape[1])

    def test_sessions(self):
        for part in ("", "a.weight", "b.weight_scale_inv", "a.", "."):
            with self.subTest(part=part):
                self.build()
                sent = {name: NEW[name] for name in NEW if part and part in name}
                self.assertTrue(self.update(sent, run_post_load=not sent))
                self.assert_serves(OLD | sent)

    def test_an_aborted_session(self):
        self.build()
        first = {"a.weight": NEW["a.weight"]}
        self.assertFalse(self.update(first | BAD, run_post_load=True))
        self.assert_serves(OLD | first)

    def test_without_a_session(self):
        self.build()
        sent = {"a.weight": NEW["a.weight"]}
        self.model.load_weights(sent.items())
        DefaultModelLoader.postprocess_weights(self.model, CPU)
        self.assert_serves(OLD | sent)

    def test_updates_from_disk(self):
        top = self.enterContext(TemporaryDirectory())
        for folder, saved in {"old": OLD, "new": NEW, "bad": NEW | BAD}.items():
            Path(top, folder).mkdir()
            save_file(saved, Path(top, folder, "model.safetensors"))
        for name, filtered, expected in (
            ("new", None, NEW),
            ("new", lambda name: "experts" in name, OLD),
            ("bad", None, OLD),
            ("missing", None, OLD),
        ):
            with self.subTest(name=name, filtered=filtered):
                self.build()
                self.config.model_path = f"{top}/old"
                done, message = self.updater.update_weights_from_disk(
                    f"{top}/{name}", "safetensors", weight_name_filter=filtered
                )
                self.assertEqual(done, name == "new", message)
                self.assert_serves(expected)
                served = f"{top}/{name if done else 'old'}"
                self.assertEqual(self.config.model_path, served)

    def test_an_empty_session_quantizes_nothing(self):
        weights = {f"{n}.weight": torch.randn(s).to(BF16) for n, s in SHAPES.items()}
        self.build(weights, serialized=False)
        before = held(self.model)
        self.update({}, run_post_load=True)
        for name, found in held(self.model).items():
            self.assertTrue(torch.equal(found, before[name]), name)

    def test_readers_of_swizzled_scales(self):
        """Others than the linear's own method."""
        self.build(backend="flashinfer_cutedsl")
        self.update(NEW, run_post_load=False)
        layer, want, read = self.model.a, interleave(NEW["a.weight_scale_inv"]), []
        owner = SimpleNamespace(
            config=SimpleNamespace(model_type="deepseek_v41"), model=self.model
        )
        with mock.patch.object(
            type(layer.quant_method),
            "apply",
            lambda self, layer, x: read.append(layer.weight_scale_inv_swizzled),
        ):
            DeepseekV4ForCausalLM.autotune_prefill_kernels(owner, 4, dtype=BF16)
        self.assertTrue(torch.equal(read[0], want))
        layer.block_fp8_mxfp8_ready = True
        stacked = _build_stacked_wkv_weight(wkv_linears=[layer, layer])
        self.assertTrue(torch.equal(stacked.mxfp8_scale, torch.cat([want, want])))


if __name__ == "__main__":
    unittest.main()
