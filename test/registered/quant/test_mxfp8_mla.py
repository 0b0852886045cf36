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
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import DeepseekV3ForCausalLM

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.environ import envs
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.quantization.mxfp8.lifecycle import (
    as_mxfp8_raw_loader,
    load_mxfp8_tensors_directly,
    load_served_model,
)
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    CpuServer,
    as_reference,
    assert_as_close_as_bf16,
    deepseek_v3,
    load_mxfp8,
    mxfp8_config,
    mxfp8_linear,
    mxfp8_state,
    random_mxfp8,
    same_bytes,
    write_checkpoint,
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


DEEPSEEK, KIMI = (
    "deepseek_v2.DeepseekV3ForCausalLM",
    "kimi_linear.KimiLinearForCausalLM",
)
# Where a model's class is; its reader is post_load_weights, or the end of load_weights.
READERS = (
    DEEPSEEK,
    "deepseek_nextn.DeepseekV3ForCausalLMNextN",
    "longcat_flash.LongcatFlashForCausalLM",
    "longcat_flash_nextn.LongcatFlashForCausalLMNextN",
    "bailing_moe_linear.BailingMoeV2_5ForCausalLM",
    KIMI,
    "minicpm3.MiniCPM3ForCausalLM",
)


def read(reader: str, attn) -> None:
    """Run a model's own reader on a model of one such attention layer."""
    module, _, name = reader.partition(".")
    # bailing_moe_linear imports an AWQ kernel of vllm's where there is no CUDA.
    vllm = {"vllm": mock.MagicMock(), "vllm._custom_ops": mock.MagicMock()}
    with mock.patch.dict(sys.modules, vllm):
        cls = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)
    own = [attn, attn] if module == "longcat_flash" else attn
    layer = SimpleNamespace(self_attn=own, attention=attn)
    model = SimpleNamespace(
        model=SimpleNamespace(
            layers=[layer], decoder=layer, start_layer=0, end_layer=1
        ),
        config=SimpleNamespace(
            num_hidden_layers=1,
            mla_scale_q_lora=False,
            mla_scale_kv_lora=False,
            is_moe=False,
            full_attention_layer_ids=[0],
        ),
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
                self.check_reads(reader)

    def check_reads(self, reader: str) -> None:
        attn = attention()
        weights = attn.kv_b_proj.mxfp8_weights
        expected = load(attn, seed=0)
        read(reader, attn)
        self.assert_read(attn, expected)
        addresses = attn.w_kc.data_ptr(), attn.w_vc.data_ptr()
        weights.to_kernel_form()
        kernel_bytes = attn.kv_b_proj.weight.clone()
        read(reader, attn)
        self.assert_read(attn, expected)
        self.assertTrue(same_bytes(attn.kv_b_proj.weight, kernel_bytes))
        for seed in (1, 2):
            expected = load(attn, seed)
            read(reader, attn)
            self.assert_read(attn, expected)
            weights.to_kernel_form()
        if reader not in READERS[-2:]:  # these two make new tensors
            held = attn.w_kc.data_ptr(), attn.w_vc.data_ptr()
            self.assertEqual(held, addresses)

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
        loader = mock.Mock(load_config=LoadConfig())
        loader.load_model.return_value = model
        config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Tiny"]))
        # No model class, so no copy of it to check updates with.
        with envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True):
            return load_served_model(loader, config, None)

    def test_raw_writes_remake_what_was_read(self):
        for reader in "own", "child's", "load_weights":
            with self.subTest(reader):
                attn = attention()
                load(attn, seed=0)
                model = self.served(attn, reader)
                _, weight, scale = random_mxfp8(*attn.kv_b_proj.weight.shape, seed=1)
                sent = {"weight": weight, "weight_scale_inv": scale}
                load_mxfp8_tensors_directly(
                    model, [(f"kv_b_proj.{name}", t) for name, t in sent.items()]
                )
                expected = load(attention(), seed=1)
                self.assert_read(attn, expected)

                def custom_loader(model, tensors):
                    for name, tensor in tensors:
                        getattr(model.kv_b_proj, name).data.copy_(tensor)

                sent["weight_scale_inv"] = scale + 1
                as_mxfp8_raw_loader(custom_loader)(model, list(sent.items()))
                self.assert_read(attn, [2 * means for means in expected])

    def test_every_kernel_form_is_read(self):
        for backend, v in (
            ("flashinfer_trtllm", V),
            ("flashinfer_cutlass", V),
            ("flashinfer_cutlass", 40),  # N = 272, no multiple of 32: weight_only
        ):
            with self.subTest(backend=backend, v=v):
                attn = attention(backend, v)
                weights = attn.kv_b_proj.mxfp8_weights
                self.assertEqual(weights.backend.is_weight_only(), v == 40)
                expected = load(attn, seed=0)
                weights.to_kernel_form()
                read(DEEPSEEK, attn)
                self.assert_read(attn, expected)


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
PROMPT = torch.randint(3, 512, (96,), generator=torch.Generator().manual_seed(7))


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
        cls.at_start = server.logprobs(PROMPT.tolist())

    def tearDown(self):
        """Back to checkpoint 0, bit for bit."""
        self.assert_succeeds(self.server.update_from_disk(self.paths[0]))
        served = self.server.logprobs(PROMPT.tolist())
        self.assertTrue(torch.equal(served, self.at_start))

    def assert_succeeds(self, result: dict) -> None:
        self.assertTrue(result["success"], result["message"])

    def assert_agrees(self, tensors: dict, served=None, ids=PROMPT.tolist()) -> None:
        """`served` is of the last ids; by default, the server is asked."""
        served = self.server.logprobs(ids) if served is None else served
        model = as_reference(DeepseekV3ForCausalLM(CONFIG), tensors)
        assert_as_close_as_bf16(served, model, ids, times=1.5)

    def test_at_start_and_after_an_update(self):
        self.assert_agrees(self.tensors[0], self.at_start)
        self.assert_succeeds(self.server.update_from_disk(self.paths[1]))
        self.assert_agrees(self.tensors[1])

    def test_updates_of_parts(self):
        """A kv_b_proj; a half of a fused layer, and of that a weight without its scale."""
        tensors = dict(self.tensors[0])
        for layer in (
            "model.layers.1.self_attn.kv_b_proj",
            "model.layers.0.self_attn.q_a_proj",
            "model.layers.0.self_attn.kv_a_proj_with_mqa",
        ):
            with self.subTest(layer):
                sent = [n for n in tensors if n.startswith(f"{layer}.")]
                self.assertEqual(len(sent), 2)
                for name in sent:
                    tensors[name] = self.tensors[1][name]
                    result = self.server.update_from_tensor([(name, tensors[name])])
                    self.assert_succeeds(result)
                self.assert_agrees(tensors)

    def test_decode(self):
        generated = self.server.post(
            "/generate",
            input_ids=PROMPT.tolist(),
            sampling_params=dict(max_new_tokens=16, temperature=0, ignore_eos=True),
            return_logprob=True,
        )["meta_info"]["output_token_logprobs"]
        served = torch.tensor([logprob for logprob, _, _ in generated])
        ids = PROMPT.tolist() + [token for _, token, _ in generated]
        self.assert_agrees(self.tensors[0], served, ids)


if __name__ == "__main__":
    unittest.main()
