"""What trtllm serves after updates of MXFP8 weights. SM100 and FlashInfer's 128x4 layout
are patched by name; no kernel runs.
"""

import unittest
from contextlib import ExitStack
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
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.model_executor.model_runner_components import weight_updater
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM
from sglang.srt.runtime_context import override_platform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.layer_ut_utils import init_single_process_dist
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="base-a-test-cpu")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = {"a": (256, 256), "b": (160, 512)}  # one in whole tiles of 128 rows, one not


def interleave(scale: torch.Tensor) -> torch.Tensor:
    """FlashInfer's 128x4 layout of [rows, groups], by its definition; 1-D, padded."""
    rows, groups = scale.shape
    tiles = -(-groups // 4)
    out = torch.zeros(-(-rows // 128) * 128 * tiles * 4, dtype=torch.uint8)
    r, g = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    tile = r // 128 * tiles + g // 4
    out[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4] = scale
    return out


def shuffled(weight: torch.Tensor, scale: torch.Tensor):
    """What trtllm reads, by FlashInfer's own functions: the weight and the scale."""
    padded = torch.zeros(-(-len(scale) // 128) * 128, scale.shape[1], dtype=torch.uint8)
    padded[: len(scale)] = scale
    rows = flashinfer.shuffle_matrix_a(weight.view(torch.uint8), 128)
    scale = flashinfer.shuffle_matrix_sf_a(padded, 128, num_elts_per_sf=32)
    return rows.flatten(), scale.flatten()


def tensors(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (n, k) in SHAPES.items():
        weight = torch.randn(n, k, generator=generator)
        found[f"{name}.weight"] = weight.to(torch.float8_e4m3fn)
        scale = torch.randint(100, 130, (n, k // 32), generator=generator)
        found[f"{name}.weight_scale_inv"] = scale.to(torch.uint8)
    return found


class Model(torch.nn.Module):
    def __init__(self, serialized: bool):
        super().__init__()
        config = Fp8Config(is_checkpoint_fp8_serialized=serialized, use_mxfp8=True)
        for name, (n, k) in SHAPES.items():
            linear = ReplicatedLinear(
                k, n, bias=False, params_dtype=BF16, quant_config=config
            )
            setattr(self, name, linear)

    def load_weights(self, weights):
        for name, tensor in weights:
            param = self.get_parameter(name)
            param.weight_loader(param, tensor)


class TestMxfp8Restore(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_dist()

    def setUp(self):
        patches = ExitStack()
        self.addCleanup(patches.close)
        patch, fp4 = mock.patch.object, flashinfer.quantization.fp4_quantization
        for each in (
            override_platform(is_sm100=True, is_blackwell=True),
            patch(fp8_utils, "is_flashinfer_available", lambda: True),
            patch(
                fp8_utils,
                "_raw_flashinfer_mm_mxfp8",
                mock.Mock(is_backend_supported=lambda *_: True),
                create=True,
            ),
            patch(flashinfer, "block_scale_interleave", interleave),
            patch(fp4, "block_scale_interleave", interleave),
            patch(
                weight_updater,
                "get_model",
                lambda: SimpleNamespace(weight_cache_mode="off"),
            ),
            patch(weight_updater, "get_pp_stage_load_group", lambda: None),
        ):
            patches.enter_context(each)

    def build(self, served=None, backend="flashinfer_trtllm", serialized=True):
        flag = fp8_utils.Fp8GemmRunnerBackend(backend)
        with mock.patch.object(fp8_utils, "get_fp8_gemm_runner_backend", lambda: flag):
            model = Model(serialized)
        weights = (served or tensors(1)).items()
        DefaultModelLoader.load_weights_and_postprocess(model, weights, CPU)
        return model

    def updater(self, model, path: str = ""):
        own = SimpleNamespace(architectures=["Model"], model_type="")
        self.config = SimpleNamespace(
            model_path=path,
            revision=None,
            dtype=BF16,
            hf_config=own,
            quantization=None,
        )
        nothing = mock.Mock()
        return weight_updater.WeightUpdater(
            tp_rank=0,
            device="cpu",
            gpu_id=0,
            model_config=self.config,
            custom_weight_loaders={},
            get_model=lambda: model,
            update_model_fields=nothing,
            recapture_cuda_graph=nothing,
            get_model_runner=nothing,
        )

    def assert_serves(self, model, expected: dict):
        for name in SHAPES:
            layer, scale = getattr(model, name), expected[f"{name}.weight_scale_inv"]
            want = shuffled(expected[f"{name}.weight"], scale)
            found = layer.weight.view(torch.uint8), layer.weight_scale_inv_shuffled
            for one, other in zip(found, want):
                self.assertTrue(torch.equal(one.flatten(), other), name)

    def test_there_and_back(self):
        served = tensors(1)
        model = self.build(served)
        places = {name: p.data_ptr() for name, p in model.named_parameters()}
        self.assert_serves(model, served)
        for _ in range(2):
            for _ in range(2):
                DefaultModelLoader.restore_weights_before_loading(model, CPU)
            for name, tensor in served.items():
                found = model.get_parameter(name).view(torch.uint8)
                self.assertTrue(torch.equal(found, tensor.view(torch.uint8)), name)
            for _ in range(2):
                DefaultModelLoader.postprocess_weights(model, CPU)
            self.assert_serves(model, served)
        found = {name: p.data_ptr() for name, p in model.named_parameters()}
        self.assertEqual(found, places)

    def test_one_copy_of_the_scale(self):
        for layer in self.build().children():
            scale, kernel = layer.weight_scale_inv, layer.weight_scale_inv_shuffled
            self.assertEqual(scale.data_ptr(), kernel.data_ptr())
            size = scale.untyped_storage().nbytes()
            self.assertEqual(size, -(-len(scale) // 128) * 128 * scale.shape[1])

    def test_sessions(self):
        old, new = tensors(1), tensors(2)
        for part in ("", "a.weight", "b.weight_scale_inv", "a.", "."):
            with self.subTest(part=part):
                model = self.build(old)
                updater = self.updater(model)
                sent = {name: new[name] for name in new if part and part in name}
                updater.begin_weight_update()
                done, _ = updater.load_weights_from_distributed(list(sent.items()))
                self.assertTrue(done)
                updater.end_weight_update(run_post_load=not sent)
                self.assert_serves(model, old | sent)

    def test_an_aborted_session(self):
        old, new = tensors(1), tensors(2)
        model = self.build(old)
        updater = self.updater(model)
        updater.begin_weight_update()
        bad = [("a.weight", new["a.weight"]), ("b.weight", torch.zeros(3, 5))]
        self.assertFalse(updater.load_weights_from_distributed(bad)[0])
        updater.end_weight_update(run_post_load=True)
        self.assert_serves(model, old | {"a.weight": new["a.weight"]})

    def test_without_a_session(self):
        old, new = tensors(1), tensors(2)
        model = self.build(old)
        model.load_weights([("a.weight", new["a.weight"])])
        DefaultModelLoader.postprocess_weights(model, CPU)
        self.assert_serves(model, old | {"a.weight": new["a.weight"]})

    def test_updates_from_disk(self):
        old, new = tensors(1), tensors(2)
        cases = {"new": new, "bad": new | {"b.weight": torch.zeros(3, 5)}}
        for name, filtered, expected in (
            ("new", None, new),
            ("new", lambda name: "experts" in name, old),
            ("bad", None, old),
            ("missing", None, old),
        ):
            with self.subTest(
                name=name, filtered=filtered
            ), TemporaryDirectory() as top:
                for folder, saved in {"old": old, **cases}.items():
                    Path(top, folder).mkdir()
                    save_file(saved, Path(top, folder, "model.safetensors"))
                model, path = self.build(old), f"{top}/old"
                done, message = self.updater(model, path).update_weights_from_disk(
                    f"{top}/{name}", "safetensors", weight_name_filter=filtered
                )
                self.assertEqual(done, name == "new", message)
                self.assert_serves(model, expected)
                if not done:
                    self.assertEqual(self.config.model_path, path)

    def test_an_empty_session_quantizes_nothing(self):
        weights = {f"{n}.weight": torch.randn(s).to(BF16) for n, s in SHAPES.items()}
        model = self.build(weights, serialized=False)
        before = {name: p.clone() for name, p in model.named_parameters()}
        updater = self.updater(model)
        updater.begin_weight_update()
        updater.end_weight_update(run_post_load=True)
        for name, param in model.named_parameters():
            self.assertTrue(
                torch.equal(param.view(torch.uint8), before[name].view(torch.uint8))
            )

    def test_readers_of_swizzled_scales(self):
        old, new = tensors(1), tensors(2)
        model = self.build(old, "flashinfer_cutedsl")
        updater = self.updater(model)
        updater.begin_weight_update()
        updater.load_weights_from_distributed(list(new.items()))
        updater.end_weight_update(run_post_load=False)
        want = interleave(new["a.weight_scale_inv"])
        read = []
        with mock.patch.object(
            type(model.a.quant_method),
            "apply",
            lambda self, layer, x: read.append(layer.weight_scale_inv_swizzled),
        ):
            owner = SimpleNamespace(
                config=SimpleNamespace(model_type="deepseek_v41"), model=model
            )
            DeepseekV4ForCausalLM.autotune_prefill_kernels(owner, 4, dtype=BF16)
        self.assertTrue(torch.equal(read[0], want))
        model.a.block_fp8_mxfp8_ready = True
        stacked = _build_stacked_wkv_weight(wkv_linears=[model.a, model.a])
        self.assertTrue(torch.equal(stacked.mxfp8_scale, torch.cat([want, want])))


if __name__ == "__main__":
    unittest.main()
