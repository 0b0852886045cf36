"""MLA models, which read kv_b_proj's weight themselves, with MXFP8 layers on a CPU.

TestReaders runs each model's own reader on real MXFP8 layers inside a bare model.
TestDeepseekV3ServerCpu serves a tiny dense DeepseekV3ForCausalLM, kernels emulated.

Not run here: prefill through kv_b_proj's own forward (MHA), since torch_native, the one
attention backend without kernels, reads keys and values from the latent cache; a
registered handler makes it absorb w_kc and w_vc in prefill as it does in decode. Nor
MoE, CUDA graphs, DeepGEMM (its switches are set, its kernels are not) or any GPU.
"""

import importlib
import os
import sys
import tempfile
import types
import unittest
from itertools import product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import DeepseekV3ForCausalLM

from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.quantization.mxfp8.lifecycle import (
    as_mxfp8_raw_loader,
    load_mxfp8_tensors_directly,
)
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    CpuServer,
    as_reference,
    as_served,
    assert_as_close_as_bf16,
    deepseek_v3,
    load_mxfp8,
    mxfp8_config,
    mxfp8_linear,
    mxfp8_state,
    random_mxfp8,
    same_bytes,
    write_checkpoint,
    write_past_the_loaders,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=50, suite="default")

HEADS, NOPE, V = 2, 96, 64  # N = 320: no multiple of 128, so the scale has padding
RANK = 256


def attention(backend: str = "flashinfer_trtllm", v: int = V) -> SimpleNamespace:
    """What a reader sees of an attention layer: a real kv_b_proj and empty w_kc, w_vc."""
    return SimpleNamespace(
        kv_b_proj=mxfp8_linear(HEADS * (NOPE + v), RANK, backend),
        qk_nope_head_dim=NOPE,
        v_head_dim=v,
        w_kc=None,
        w_vc=None,
        w_scale=1.0,
        w_scale_k=None,
        w_scale_v=None,
        use_deep_gemm_bmm=False,
    )


def load(attn, seed: int) -> tuple:
    """Load random tensors through the loaders; float64 w_kc and w_vc that they mean."""
    _, weight, scale = random_mxfp8(*attn.kv_b_proj.weight.shape, seed)
    load_mxfp8(attn.kv_b_proj, weight, scale)
    means = dequantize(weight, scale).double().view(HEADS, -1, RANK)
    return means[:, :NOPE], means[:, NOPE:].transpose(1, 2)


# Where a model's class is; its reader is post_load_weights, or the end of load_weights.
READERS = (
    "deepseek_v2.DeepseekV3ForCausalLM",
    "deepseek_nextn.DeepseekV3ForCausalLMNextN",
    "longcat_flash.LongcatFlashForCausalLM",
    "longcat_flash_nextn.LongcatFlashForCausalLMNextN",
    "bailing_moe_linear.BailingMoeV2_5ForCausalLM",
    "kimi_linear.KimiLinearForCausalLM",
    "minicpm3.MiniCPM3ForCausalLM",
)
DEEPSEEK, KIMI, MINICPM3 = READERS[0], *READERS[-2:]


def read(reader: str, attn) -> None:
    """Run a model's own reader on a model of one such attention layer."""
    module, _, name = reader.partition(".")
    # bailing_moe_linear imports an AWQ kernel of vllm's where there is no CUDA.
    vllm = {"vllm": mock.MagicMock(), "vllm._custom_ops": mock.MagicMock()}
    with mock.patch.dict(sys.modules, vllm):
        cls = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)
    own = [attn, attn] if module == "longcat_flash" else attn
    layer = SimpleNamespace(self_attn=own, attention=attn)
    layers = dict(layers=[layer], decoder=layer, start_layer=0, end_layer=1)
    config = dict.fromkeys(("mla_scale_q_lora", "mla_scale_kv_lora", "is_moe"), False)
    config |= dict(num_hidden_layers=1, full_attention_layer_ids=[0])
    model = SimpleNamespace(
        model=SimpleNamespace(**layers),
        config=SimpleNamespace(**config),
        quant_config=mxfp8_config(),
        num_experts=0,
        named_parameters=list,
    )
    if hasattr(cls, "_weight_requant_ue8m0"):
        model._weight_requant_ue8m0 = types.MethodType(cls._weight_requant_ue8m0, model)
    if hasattr(cls, "post_load_weights"):
        is_nextn = dict(is_nextn=True) if module == "deepseek_nextn" else {}
        cls.post_load_weights(model, **is_nextn)
    else:
        kv_b_proj = attn.kv_b_proj
        cls.load_weights(model, [])
        attn.kv_b_proj = kv_b_proj  # minicpm3 deletes it, and cannot be updated


class TestReaders(CustomTestCase):
    def assert_read(self, attn, expected):
        for name, tensor in zip(("w_kc", "w_vc"), expected):
            held = getattr(attn, name)
            self.assertEqual(held.dtype, torch.bfloat16, name)
            # Exact: an e4m3 value times a power of two is a bf16 value.
            self.assertTrue(torch.equal(held.double(), tensor), name)
        self.assertEqual(attn.w_scale, 1.0)

    def test_at_load_in_kernel_form_and_after_reloads(self):
        # As on SM100, where readers unpack or requantize block-FP8 scales; and elsewhere.
        for on_sm100, reader in product((True, False), READERS):
            switches = dict(ENABLE_JIT_DEEPGEMM=on_sm100, DEEPGEMM_SCALE_UE8M0=on_sm100)
            wants = mock.patch.multiple(deep_gemm_wrapper, **switches)
            with self.subTest(reader, on_sm100=on_sm100), wants:
                self.check_reads(reader, attention())
        for backend, v in (
            ("flashinfer_cutlass", V),
            ("flashinfer_cutlass", 40),  # N = 272, no multiple of 32: weight_only
        ):
            with self.subTest(backend=backend, v=v):
                attn = attention(backend, v)
                is_weight_only = attn.kv_b_proj.mxfp8_weights.backend.is_weight_only()
                self.assertEqual(is_weight_only, v == 40)
                self.check_reads(DEEPSEEK, attn)

    def check_reads(self, reader: str, attn) -> None:
        weights, kv_b_proj, addresses = attn.kv_b_proj.mxfp8_weights, attn.kv_b_proj, []
        for seed in range(3):
            expected = load(attn, seed)
            read(reader, attn)
            self.assert_read(attn, expected)
            addresses.append((attn.w_kc.data_ptr(), attn.w_vc.data_ptr()))
            weights.to_kernel_form()
            kernel_bytes = kv_b_proj.weight.clone()
            read(reader, attn)
            self.assert_read(attn, expected)
            self.assertTrue(same_bytes(kv_b_proj.weight, kernel_bytes))
        if reader not in (KIMI, MINICPM3):  # these two make new tensors
            self.assertEqual(len(set(addresses)), 1)

    def served(self, attn, reader: str):
        """A model of kv_b_proj alone, whose reader is its own, a child's, or Kimi's, which
        has no post_load_weights."""
        model = torch.nn.Module()
        model.kv_b_proj = attn.kv_b_proj
        model.language_model = torch.nn.Module()
        owner = model.language_model if reader == "child's" else model
        model.load_weights = lambda _: None
        if reader == "load_weights":
            model.load_weights = lambda _: read(KIMI, attn)
        else:
            owner.post_load_weights = lambda: read(DEEPSEEK, attn)
        hf_config = SimpleNamespace(architectures=["Tiny"])
        return as_served(model, model_config=SimpleNamespace(hf_config=hf_config))

    def test_raw_writes_remake_what_was_read(self):
        for reader in "own", "child's", "load_weights":
            with self.subTest(reader):
                attn = attention()
                expected = load(attn, seed=1)
                weight, scale = attn.kv_b_proj.weight, attn.kv_b_proj.weight_scale_inv
                sent = {
                    "kv_b_proj.weight": weight.clone(),
                    "kv_b_proj.weight_scale_inv": scale.clone(),
                }
                load(attn, seed=0)
                model = self.served(attn, reader)
                load_mxfp8_tensors_directly(model, sent.items())
                self.assert_read(attn, expected)
                sent["kv_b_proj.weight_scale_inv"] += 1
                as_mxfp8_raw_loader(write_past_the_loaders)(model, list(sent.items()))
                self.assert_read(attn, [2 * means for means in expected])


# Makes MLA on torch_native absorb kv_b_proj in prefill too; see the module's docstring.
ABSORBED_PREFILL = """
from sglang.srt.models.deepseek_common.attention_backend_handler import (
    AttentionBackendRegistry,
    _dispatch_mla_subtype,
)

AttentionBackendRegistry.register("torch_native", _dispatch_mla_subtype)
"""
LAYERS = 2
CONFIG = deepseek_v3(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=LAYERS,
    first_k_dense_replace=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_nextn_predict_layers=0,
    initializer_range=1 / 16,  # so that attention matters
)
PROMPT = Random(7).choices(range(3, 512), k=96)


class TestDeepseekV3ServerCpu(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.tensors, cls.paths = [], []
        for seed in range(2):
            torch.manual_seed(seed)
            cls.tensors.append(mxfp8_state(DeepseekV3ForCausalLM(CONFIG)))
            path, config = os.path.join(directory, str(seed)), CONFIG.to_dict()
            cls.paths.append(write_checkpoint(path, cls.tensors[seed], **config))
        package = Path(directory, "mla_in_torch_native")
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "handler.py").write_text(ABSORBED_PREFILL)
        search = os.pathsep.join([os.environ.get("PYTHONPATH", ""), directory])
        env = {"SGLANG_EXTERNAL_MODEL_PACKAGE": package.name, "PYTHONPATH": search}
        server = CpuServer(cls.paths[0], "--skip-tokenizer-init", env=env)
        cls.server = cls.enterClassContext(server)
        cls.at_start = server.logprobs(PROMPT)

    def tearDown(self):
        """Back to checkpoint 0, bit for bit."""
        self.assert_succeeds(self.server.update_from_disk(self.paths[0]))
        served = self.server.logprobs(PROMPT)
        self.assertTrue(torch.equal(served, self.at_start))

    def assert_succeeds(self, result: dict) -> None:
        self.assertTrue(result["success"], result["message"])

    def assert_serves(self, tensors: dict) -> None:
        model = as_reference(DeepseekV3ForCausalLM(CONFIG), tensors)
        served = self.server.logprobs(PROMPT)
        assert_as_close_as_bf16(served, model, PROMPT, times=1.5)

    def test_at_start_and_after_an_update(self):
        self.assert_serves(self.tensors[0])
        self.assert_succeeds(self.server.update_from_disk(self.paths[1]))
        self.assert_serves(self.tensors[1])

    def test_updates_of_parts(self):
        """A kv_b_proj; a half of a fused layer, and of that a weight without its scale."""
        tensors = dict(self.tensors[0])
        for layer in (
            "model.layers.1.self_attn.kv_b_proj",
            "model.layers.0.self_attn.q_a_proj",
            "model.layers.0.self_attn.kv_a_proj_with_mqa",
        ):
            with self.subTest(layer):
                for name in f"{layer}.weight", f"{layer}.weight_scale_inv":
                    tensors[name] = self.tensors[1][name]
                    result = self.server.update_from_tensor([(name, tensors[name])])
                    self.assert_succeeds(result)
                self.assert_serves(tensors)


if __name__ == "__main__":
    unittest.main()
