"""MLA models, which read kv_b_proj's weight themselves, with MXFP8 layers on a CPU.

TestReaders runs each model's own reader on real MXFP8 layers inside a bare model.
TestDeepseekV3ServerCpu serves a tiny dense DeepseekV3ForCausalLM, kernels emulated.

Not run here: prefill through kv_b_proj's own forward (MHA), since torch_native, the one
attention backend without kernels, reads keys and values from the latent cache; a
registered handler makes it absorb w_kc and w_vc in prefill as it does in decode. Nor
MoE, CUDA graphs, DeepGEMM (its switches are set, its kernels are not) or any GPU.
"""

import contextlib
import copy
import importlib
import json
import os
import shutil
import sys
import tempfile
import types
import unittest
from types import SimpleNamespace
from unittest import mock

import requests
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.environ import envs
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.layers.quantization.mxfp8.lifecycle import (
    as_mxfp8_raw_loader,
    load_mxfp8_tensors_directly,
    load_served_model,
)
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize, quantize
from sglang.srt.layers.quantization.mxfp8.weights import Form
from sglang.srt.utils import MultiprocessingSerializer, kill_process_tree
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    init_single_process_parallel_state,
    launch_cpu_server,
    mxfp8_config,
    prompt_logprobs,
    random_mxfp8,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=90, suite="default")

HEADS, NOPE, V = 2, 96, 64  # N = 320: no multiple of 128, so the scale has padding
RANK = 256


def attention(backend: str = "flashinfer_trtllm", v: int = V) -> SimpleNamespace:
    """What a reader sees of an attention layer: a real kv_b_proj and empty w_kc, w_vc."""
    with fp8_gemm_backend(backend):
        kv_b_proj = ColumnParallelLinear(
            RANK,
            HEADS * (NOPE + v),
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=mxfp8_config(),
            prefix="model.layers.0.self_attn.kv_b_proj",
        )
    return SimpleNamespace(
        kv_b_proj=kv_b_proj,
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
    layer = attn.kv_b_proj
    _, weight, scale = random_mxfp8(*layer.weight.shape, seed)
    layer.weight.weight_loader(layer.weight, weight)
    layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale)
    factor = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
    means = (weight.double() * factor).view(HEADS, -1, RANK)
    return means[:, :NOPE], means[:, NOPE:].transpose(1, 2)


def bare_model(cls, layer, decoder=None):
    """An object that has of the model class `cls` what its reader asks for."""
    model = SimpleNamespace(
        model=SimpleNamespace(
            layers=[layer], decoder=decoder or layer, start_layer=0, end_layer=1
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
    return model


def model_class(module: str, name: str):
    # bailing_moe_linear imports an AWQ kernel of vllm's where there is no CUDA.
    vllm = {"vllm": mock.MagicMock(), "vllm._custom_ops": mock.MagicMock()}
    with mock.patch.dict(sys.modules, vllm):
        return getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)


def read_deepseek(attn):
    cls = model_class("deepseek_v2", "DeepseekV3ForCausalLM")
    cls.post_load_weights(bare_model(cls, SimpleNamespace(self_attn=attn)))


def read_deepseek_nextn(attn):
    cls = model_class("deepseek_nextn", "DeepseekV3ForCausalLMNextN")
    model = bare_model(cls, None, decoder=SimpleNamespace(self_attn=attn))
    cls.post_load_weights(model, is_nextn=True)


def read_longcat(attn):
    cls = model_class("longcat_flash", "LongcatFlashForCausalLM")
    cls.post_load_weights(bare_model(cls, SimpleNamespace(self_attn=[attn, attn])))


def read_longcat_nextn(attn):
    cls = model_class("longcat_flash_nextn", "LongcatFlashForCausalLMNextN")
    cls.post_load_weights(bare_model(cls, SimpleNamespace(self_attn=attn)))


def read_bailing(attn):
    cls = model_class("bailing_moe_linear", "BailingMoeV2_5ForCausalLM")
    cls.post_load_weights(bare_model(cls, SimpleNamespace(attention=attn)))


def read_kimi_linear(attn):
    cls = model_class("kimi_linear", "KimiLinearForCausalLM")
    cls.load_weights(bare_model(cls, SimpleNamespace(self_attn=attn)), [])


def read_minicpm3(attn):
    cls = model_class("minicpm3", "MiniCPM3ForCausalLM")
    kv_b_proj = attn.kv_b_proj
    cls.load_weights(bare_model(cls, SimpleNamespace(self_attn=attn)), [])
    attn.kv_b_proj = kv_b_proj  # the model deletes it, and cannot be updated


POST_LOAD_READERS = (
    read_deepseek,
    read_deepseek_nextn,
    read_longcat,
    read_longcat_nextn,
    read_bailing,
)
READERS = (*POST_LOAD_READERS, read_kimi_linear, read_minicpm3)


class TestReaders(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()

    def setUp(self):
        # Longcat's readers switch DeepGEMM's scale format off, for the whole process.
        switch = mock.patch.object(deep_gemm_wrapper, "DEEPGEMM_SCALE_UE8M0", False)
        switch.start()
        self.addCleanup(switch.stop)

    def assert_read(self, attn, expected):
        for name, tensor in zip(("w_kc", "w_vc"), expected):
            read = getattr(attn, name)
            self.assertEqual(read.dtype, torch.bfloat16, name)
            # Exact: an e4m3 value times a power of two is a bf16 value.
            self.assertTrue(torch.equal(read.double(), tensor), name)
        self.assertEqual(attn.w_scale, 1.0)

    def test_at_load_in_kernel_form_and_after_reloads(self):
        for read in READERS:
            with self.subTest(read.__name__):
                attn = attention()
                weights = attn.kv_b_proj.mxfp8_weights
                expected = load(attn, seed=0)
                read(attn)
                self.assert_read(attn, expected)

                weights.to_kernel_form()
                kernel_bytes = attn.kv_b_proj.weight.view(torch.uint8).clone()
                read(attn)
                self.assert_read(attn, expected)
                self.assertEqual(weights.form, Form.KERNEL)
                self.assertTrue(
                    torch.equal(attn.kv_b_proj.weight.view(torch.uint8), kernel_bytes)
                )

                for seed in (1, 2):
                    expected = load(attn, seed)
                    read(attn)
                    self.assert_read(attn, expected)
                    weights.to_kernel_form()

    def test_a_reload_keeps_addresses(self):
        for read in POST_LOAD_READERS:
            with self.subTest(read.__name__):
                attn = attention()
                load(attn, seed=0)
                read(attn)
                addresses = attn.w_kc.data_ptr(), attn.w_vc.data_ptr()
                attn.kv_b_proj.mxfp8_weights.to_kernel_form()
                load(attn, seed=1)
                read(attn)
                self.assertEqual(
                    addresses, (attn.w_kc.data_ptr(), attn.w_vc.data_ptr())
                )

    def test_raw_writes_remake_what_was_read(self):
        """By direct and custom loaders. A multimodal model's reader is its child's;
        kimi_linear has no post_load_weights."""
        for reader in "own", "child's", "load_weights":
            with self.subTest(reader):
                attn = attention()
                load(attn, seed=0)
                model = torch.nn.Module()
                model.kv_b_proj = attn.kv_b_proj
                model.language_model = torch.nn.Module()
                owner = model.language_model if reader == "child's" else model
                owner.post_load_weights = lambda: read_deepseek(attn)
                model.load_weights = lambda _: None
                if reader == "load_weights":
                    del owner.post_load_weights
                    model.load_weights = lambda _: read_kimi_linear(attn)
                loader = mock.Mock(load_config=LoadConfig())
                loader.load_model.return_value = model
                hf_config = SimpleNamespace(architectures=["Tiny"])
                # No model class, so no copy of it to check updates with.
                with envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True):
                    load_served_model(
                        loader, SimpleNamespace(hf_config=hf_config), None
                    )
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
                self.assertEqual(attn.kv_b_proj.mxfp8_weights.form, Form.KERNEL)

    def test_an_update_of_the_scale_alone(self):
        attn = attention()
        w_kc, w_vc = load(attn, seed=0)
        read_deepseek(attn)
        weights, layer = attn.kv_b_proj.mxfp8_weights, attn.kv_b_proj
        scale = layer.weight_scale_inv + 1
        weights.to_kernel_form()
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale)
        read_deepseek(attn)
        self.assert_read(attn, (2 * w_kc, 2 * w_vc))

    def test_every_backend(self):
        for backend, v in (
            ("flashinfer_trtllm", V),
            ("flashinfer_cutlass", V),
            ("flashinfer_cutlass", 40),  # N = 272, no multiple of 32: served in bf16
        ):
            with self.subTest(backend=backend, v=v):
                attn = attention(backend, v)
                weights = attn.kv_b_proj.mxfp8_weights
                self.assertEqual(weights.backend.is_weight_only(), v == 40)
                expected = load(attn, seed=0)
                weights.to_kernel_form()
                read_deepseek(attn)
                self.assert_read(attn, expected)

    def test_where_deep_gemm_wants_e8m0_scales(self):
        """As on SM100, where readers unpack or requantize block-FP8 scales."""
        for read in READERS:
            with self.subTest(read.__name__):
                attn = attention()
                expected = load(attn, seed=0)
                with mock.patch.multiple(
                    deep_gemm_wrapper,
                    ENABLE_JIT_DEEPGEMM=True,
                    DEEPGEMM_SCALE_UE8M0=True,
                ):
                    read(attn)
                self.assert_read(attn, expected)

    def test_kv_b_proj_multiplies_with_what_was_read(self):
        attn = attention()
        load(attn, seed=0)
        read_deepseek(attn)
        attn.kv_b_proj.mxfp8_weights.to_kernel_form()
        x = torch.randn(5, RANK).bfloat16()
        x_read = dequantize(*quantize(x)).double()
        output = attn.kv_b_proj(x)[0].double().view(5, HEADS, NOPE + V)
        keys = torch.einsum("tk,hdk->thd", x_read, attn.w_kc.double())
        values = torch.einsum("tk,hkv->thv", x_read, attn.w_vc.double())
        expected = torch.cat([keys, values], dim=-1)
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.05)


# Makes MLA on torch_native absorb kv_b_proj in prefill too; see the module's docstring.
ABSORBED_PREFILL = """
from sglang.srt.models.deepseek_common.attention_backend_handler import (
    AttentionBackendRegistry,
    _dispatch_mla_subtype,
)

AttentionBackendRegistry.register("torch_native", _dispatch_mla_subtype)
"""
LAYERS = 2
CONFIG = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=LAYERS,
    first_k_dense_replace=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_shared_experts=1,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    # sglang's rotary embedding for MLA on a CPU takes no other.
    rope_scaling=dict(
        type="yarn",
        factor=4.0,
        original_max_position_embeddings=512,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)
PROMPT = torch.randint(3, 512, (96,), generator=torch.Generator().manual_seed(7))


class QuantizedInputLinear(torch.nn.Linear):
    """A linear layer whose input goes through MXFP8, as the kernels' does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_2d = dequantize(*quantize(x.reshape(-1, x.shape[-1])))
        return super().forward(x_2d.view(x.shape).to(x.dtype))


def make_checkpoint(path: str, seed: int) -> DeepseekV3ForCausalLM:
    """Save a random MXFP8 checkpoint; the same model in transformers, in fp32.

    Of its linears, kv_b_proj alone has inputs that stay unquantized, as absorbed MLA
    has it.
    """
    config = DeepseekV3Config(**CONFIG)
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config).float().eval()
    tensors = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(name, recurse=False):
            if not isinstance(module, torch.nn.Linear):
                tensors[key] = parameter.data.bfloat16()
                parameter.data = tensors[key].float()
                continue
            # Larger than the initial weights, so that attention matters.
            parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
            if name == "lm_head":
                tensors[key] = parameter.data.bfloat16()
                parameter.data = tensors[key].float()
                continue
            tensors[key], tensors[f"{key}_scale_inv"] = quantize(parameter.data)
            parameter.data = dequantize(tensors[key], tensors[f"{key}_scale_inv"])
            if not name.endswith("kv_b_proj"):
                module.__class__ = QuantizedInputLinear
    os.makedirs(path, exist_ok=True)
    save_file(tensors, os.path.join(path, "model.safetensors"))
    written = {
        **config.to_dict(),
        "architectures": ["DeepseekV3ForCausalLM"],
        "torch_dtype": "bfloat16",
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
        "quantization_config": {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, 32],
        },
    }
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump(written, file)
    return model


@torch.no_grad()
def expected_logprobs(model: DeepseekV3ForCausalLM, input_ids: list) -> torch.Tensor:
    logits = model(torch.tensor([input_ids])).logits[0, :-1].float()
    targets = torch.tensor(input_ids[1:]).unsqueeze(1)
    return logits.log_softmax(-1).gather(1, targets)[:, 0]


class TestDeepseekV3ServerCpu(CustomTestCase):
    base_url = "http://127.0.0.1:31879"

    @classmethod
    def setUpClass(cls):
        # Tensors reach a server over HTTP by name, not by file descriptor.
        torch.multiprocessing.set_sharing_strategy("file_system")
        with contextlib.ExitStack() as stack:
            cls.directory = tempfile.mkdtemp()
            stack.callback(shutil.rmtree, cls.directory)
            cls.paths = [os.path.join(cls.directory, f"model{i}") for i in range(2)]
            cls.models = [make_checkpoint(path, i) for i, path in enumerate(cls.paths)]
            package = os.path.join(cls.directory, "mla_in_torch_native")
            os.makedirs(package)
            for name, text in ("__init__", ""), ("handler", ABSORBED_PREFILL):
                with open(os.path.join(package, f"{name}.py"), "w") as file:
                    file.write(text)
            process = launch_cpu_server(
                cls.paths[0],
                cls.base_url,
                "flashinfer_trtllm",
                ["--skip-tokenizer-init"],
                env={
                    "SGLANG_EXTERNAL_MODEL_PACKAGE": os.path.basename(package),
                    "PYTHONPATH": os.pathsep.join(
                        [os.environ.get("PYTHONPATH", ""), cls.directory]
                    ),
                },
            )
            stack.callback(kill_process_tree, process.pid)
            cls.at_start = prompt_logprobs(cls.base_url, PROMPT.tolist())
            cls.addClassCleanup(stack.pop_all().close)

    def update(self, path: str) -> None:
        response = requests.post(
            f"{self.base_url}/update_weights_from_disk",
            json={"model_path": path, "flush_cache": True},
            timeout=120,
        )
        self.assertTrue(response.json()["success"], response.text)

    def assert_logprobs(self, served: torch.Tensor, model, input_ids: list) -> None:
        """`served`, of the last tokens, is no further from fp32 than bf16 moves it."""
        expected = expected_logprobs(model, input_ids)
        in_bf16 = expected_logprobs(copy.deepcopy(model).bfloat16(), input_ids)
        bf16_error = (in_bf16 - expected).abs().mean()
        error = (served - expected[-len(served) :]).abs().mean()
        print(
            f"mean |logprob - transformers fp32|: served {error:.3f}, "
            f"transformers bf16 {bf16_error:.3f}"
        )
        self.assertLess(error, 1.5 * bf16_error)

    def test_it_agrees_with_transformers_at_start_and_after_updates(self):
        prompt = PROMPT.tolist()
        self.assert_logprobs(self.at_start, self.models[0], prompt)
        self.update(self.paths[1])
        updated = prompt_logprobs(self.base_url, prompt)
        self.assert_logprobs(updated, self.models[1], prompt)
        self.update(self.paths[0])
        back = prompt_logprobs(self.base_url, prompt)
        self.assertTrue(torch.equal(back, self.at_start))

    def test_an_update_of_one_kv_b_proj(self):
        self.update(self.paths[0])
        name = "model.layers.1.self_attn.kv_b_proj"
        tensors = load_file(os.path.join(self.paths[1], "model.safetensors"))
        sent = [(key, tensors[key]) for key in tensors if key.startswith(name)]
        self.assertEqual(len(sent), 2)
        response = requests.post(
            f"{self.base_url}/update_weights_from_tensor",
            json={
                "serialized_named_tensors": [
                    MultiprocessingSerializer.serialize(sent, output_str=True)
                ],
                "flush_cache": True,
            },
            timeout=120,
        )
        self.assertTrue(response.json()["success"], response.text)
        mixed = copy.deepcopy(self.models[0])
        linear, other = (m.get_submodule(name) for m in (mixed, self.models[1]))
        linear.weight.data = other.weight.data
        served = prompt_logprobs(self.base_url, PROMPT.tolist())
        self.assert_logprobs(served, mixed, PROMPT.tolist())
        self.assertFalse(torch.equal(served, self.at_start))

    def test_half_of_a_fused_layer_keeps_the_other(self):
        self.update(self.paths[0])
        tensors = [
            load_file(os.path.join(path, "model.safetensors")) for path in self.paths
        ]
        expected = copy.deepcopy(self.models[0])
        for half in "q_a_proj", "kv_a_proj_with_mqa":
            name = f"model.layers.0.self_attn.{half}"
            # Alone too: a bucket may part a weight and its scale.
            for key in f"{name}.weight", f"{name}.weight_scale_inv":
                response = requests.post(
                    f"{self.base_url}/update_weights_from_tensor",
                    json={
                        "serialized_named_tensors": [
                            MultiprocessingSerializer.serialize(
                                [(key, tensors[1][key])], output_str=True
                            )
                        ],
                        "flush_cache": True,
                    },
                    timeout=120,
                )
                self.assertTrue(response.json()["success"], response.text)
            linear, other = (m.get_submodule(name) for m in (expected, self.models[1]))
            linear.weight.data = other.weight.data
            served = prompt_logprobs(self.base_url, PROMPT.tolist())
            self.assert_logprobs(served, expected, PROMPT.tolist())
        self.assertFalse(torch.equal(served, self.at_start))
        self.update(self.paths[0])
        served = prompt_logprobs(self.base_url, PROMPT.tolist())
        self.assertTrue(torch.equal(served, self.at_start))

    def test_decode_agrees_with_transformers(self):
        self.update(self.paths[0])
        response = requests.post(
            f"{self.base_url}/generate",
            json={
                "input_ids": PROMPT.tolist(),
                "sampling_params": {
                    "max_new_tokens": 16,
                    "temperature": 0,
                    "ignore_eos": True,
                },
                "return_logprob": True,
            },
            timeout=120,
        ).json()
        generated = response["meta_info"]["output_token_logprobs"]
        served = torch.tensor([logprob for logprob, _, _ in generated])
        tokens = [token for _, token, _ in generated]
        self.assert_logprobs(served, self.models[0], PROMPT.tolist() + tokens)


if __name__ == "__main__":
    unittest.main()
