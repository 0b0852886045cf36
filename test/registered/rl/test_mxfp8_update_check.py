"""What no MXFP8 model takes, at start or in an update, on a CPU: real loaders, tiny models.

Kernels are emulated. That experts are in MXFP8, which only SM100 runs, is patched by name;
nothing here runs them.
"""

import contextlib
import functools
import json
import os
import tempfile
import threading
import time
import unittest
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp8 import lifecycle
from sglang.srt.layers.quantization.mxfp8.agreement import (
    UpdateRefused,
    agree_to_write,
    note_taken,
    run_weight_update,
)
from sglang.srt.layers.quantization.mxfp8.lifecycle import (
    as_mxfp8_raw_loader,
    check_mxfp8_disk_update,
    load_mxfp8_tensors_directly,
    mxfp8_checkpoint_form,
)
from sglang.srt.layers.quantization.mxfp8.meta import build_on_meta
from sglang.srt.layers.quantization.mxfp8.update_check import UpdateCheck
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.lora.layers import get_lora_layer
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_loader.loader import _initialize_model, get_model_loader
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.utils import replace_submodule
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TINY_LLAMA,
    fp8_gemm_backend,
    fused_parameters,
    init_single_process_parallel_state,
    load_on_cpu,
    mxfp8_config,
    tiny_llama_tensors,
    write_checkpoint,
    write_past_the_loaders,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")

DOWN = "model.layers.0.mlp.down_proj.weight"
UP_SCALE = "model.layers.1.mlp.up_proj.weight_scale_inv"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def without(tensors: dict, *parts: str) -> dict:
    return {n: t for n, t in tensors.items() if not any(p in n for p in parts)}


def with_byte(tensors: dict, name: str, byte: int) -> dict:
    """The tensors, with one byte of one of them changed."""
    changed = tensors[name].clone()
    changed.view(torch.uint8).view(-1)[-1] = byte
    return {**tensors, name: changed}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def parameters(model: torch.nn.Module) -> dict:
    with mxfp8_checkpoint_form(model):
        return {n: as_bytes(p.data.clone()) for n, p in model.named_parameters()}


class CheckTestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.enterClassContext(fp8_gemm_backend("flashinfer_trtllm"))
        cls.directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.a, cls.b = tiny_llama_tensors(0), tiny_llama_tensors(1)
        cls.served = cls.write(cls.a)

    @classmethod
    def write(cls, tensors: dict, **changes) -> str:
        return write_checkpoint(tempfile.mkdtemp(dir=cls.directory), tensors, **changes)

    def disk_update(self, model, path: str, **kwargs):
        config = SimpleNamespace(
            model_path=self.served,
            revision=None,
            quantization="mxfp8",
            hf_config=None,
        )
        return check_mxfp8_disk_update(
            model, config, get_model_loader, path, "auto", **kwargs
        )

    @contextlib.contextmanager
    def refused(self, model, reason: str):
        before = parameters(model)
        with self.assertRaisesRegex(ValueError, reason):
            yield
        after = parameters(model)
        for name, tensor in before.items():
            self.assertTrue(torch.equal(tensor, after[name]), name)


class TestWhole(CheckTestCase):
    """What does not fill the model is refused, at start and as an update from disk."""

    def assert_refused(self, path: str, reason: str) -> None:
        with self.subTest("start"), self.assertRaisesRegex(ValueError, reason):
            load_on_cpu(path)
        with self.subTest("update"):
            self.assertRegex(self.disk_update(self.model, path) or "", reason)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = load_on_cpu(cls.served)

    def test_a_tensor_is_missing(self):
        for lost, parameter in (
            ("embed_tokens", "model.embed_tokens.weight"),
            ("model.norm", "model.norm.weight"),
            (NORM, NORM),
            ("layers.1.", "layers.1.self_attn.qkv_proj.weight"),
            (K_PROJ, "layers.1.self_attn.qkv_proj.weight"),
            ("layers.1.mlp.down_proj", "layers.1.mlp.down_proj.weight"),
        ):
            with self.subTest(lost):
                path = self.write(without(self.b, lost))
                self.assert_refused(path, f"does not fill.*{parameter}|lacks the scale")

    def test_linears_in_bf16_and_a_head_are_missing(self):
        changes = dict(
            tie_word_embeddings=False,
            quantization_config={
                **TINY_LLAMA["quantization_config"],
                "modules_to_not_convert": ["layers.1.self_attn", "layers.1.mlp"],
            },
        )
        head = self.b["model.embed_tokens.weight"].clone()
        tensors = {"lm_head.weight": head, **self.b}
        tensors = {
            n: t.to(torch.bfloat16) if "layers.1." in n else t
            for n, t in tensors.items()
            if "layers.1." not in n or "scale" not in n
        }
        load_on_cpu(self.write(tensors, **changes))
        for lost, parameter in (
            ("lm_head", "lm_head.weight"),
            (K_PROJ, "layers.1.self_attn.qkv_proj.weight"),
            ("layers.1.mlp.up_proj", "layers.1.mlp.gate_up_proj.weight"),
            ("layers.1.self_attn.o_proj", "layers.1.self_attn.o_proj.weight"),
        ):
            with self.subTest(lost), self.assertRaisesRegex(ValueError, parameter):
                load_on_cpu(self.write(without(tensors, lost), **changes))

    def test_a_shard_that_the_index_names_is_missing(self):
        path = self.write(without(self.b, "embed"))
        weight_map = dict.fromkeys(self.b, "model.safetensors")
        weight_map["model.embed_tokens.weight"] = "model-00002.safetensors"
        self.write_index(path, weight_map)
        self.assert_refused(path, "embed_tokens.weight in model-00002.safetensors")

    def test_a_tensor_stands_in_two_files(self):
        path = self.write(self.b)
        save_file(
            {DOWN: self.a[DOWN], "extra": torch.ones(1)}, f"{path}/other.safetensors"
        )
        self.write_index(
            path,
            {
                **dict.fromkeys(self.b, "model.safetensors"),
                "extra": "other.safetensors",
            },
        )
        reason = f"{DOWN} stands in .*(model|other).*and in .*(model|other).safetensors"
        self.assert_refused(path, reason)
        os.remove(f"{path}/model.safetensors.index.json")
        self.assert_refused(path, reason)

    def write_index(self, path: str, weight_map: dict) -> None:
        with open(f"{path}/model.safetensors.index.json", "w") as file:
            json.dump({"weight_map": weight_map}, file)

    def test_a_whole_checkpoint_with_more_is_taken(self):
        more = {**self.b, "model.layers.2.input_layernorm.weight": torch.ones(512)}
        self.assertIsNone(self.disk_update(self.model, self.write(more)))

    def test_a_filtered_update_need_not_be_whole(self):
        self.assertIsNone(
            self.disk_update(
                self.model, self.write(self.b), name_filter=lambda n: "layers.1" in n
            )
        )

    def test_no_such_folder(self):
        message = self.disk_update(self.model, "/no/such/folder")
        self.assertRegex(message, "no such folder.*Nothing was written")


class TestContents(CheckTestCase):
    BAD = ((UP_SCALE, 255), (DOWN, 0x7F), (DOWN, 0xFF))

    def test_at_start(self):
        for name, byte in self.BAD:
            with self.subTest(name=name, byte=byte):
                with self.assertRaisesRegex(ValueError, f"{name} holds NaN"):
                    load_on_cpu(self.write(with_byte(self.b, name, byte)))

    def test_the_largest_numbers_are_taken(self):
        tensors = with_byte(with_byte(self.b, DOWN, 0xFE), UP_SCALE, 254)
        model = load_on_cpu(self.write(with_byte(tensors, K_PROJ, 0x7E)))
        model.load_weights(tensors.items())

    def test_in_memory_nothing_is_written(self):
        model = load_on_cpu(self.served)
        for name, byte in self.BAD:
            bad = with_byte(self.b, name, byte)
            for label, update in (
                ("loaders", lambda: model.load_weights(bad.items())),
                (
                    "generator",
                    lambda: model.load_weights(named for named in bad.items()),
                ),
                (
                    "direct",
                    lambda: load_mxfp8_tensors_directly(
                        model, fused_parameters(bad).items()
                    ),
                ),
                (
                    "custom",
                    lambda: as_mxfp8_raw_loader(write_past_the_loaders)(
                        model, fused_parameters(bad).items()
                    ),
                ),
            ):
                with self.subTest(label, name=name, byte=byte):
                    with self.refused(model, "holds NaN"):
                        update()

    def test_numbers_that_are_quantized_on_load(self):
        in_bf16 = {n: t.to(torch.bfloat16) for n, t in without(self.a, "scale").items()}
        path = self.write(in_bf16)
        with open(f"{path}/config.json", "w") as file:
            config = {k: v for k, v in TINY_LLAMA.items() if k != "quantization_config"}
            json.dump(config, file)
        model = load_on_cpu(path, quantization="mxfp8")
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = {**in_bf16, DOWN: in_bf16[DOWN].clone()}
            bad[DOWN][3, 4] = value
            with self.subTest(value), self.refused(model, DOWN):
                model.load_weights(bad.items())

    def test_a_disk_update_goes_back_to_what_was_served(self):
        model = load_on_cpu(self.served)
        runner = ModelRunner.__new__(ModelRunner)
        config = SimpleNamespace(
            model_path=self.served,
            revision=None,
            quantization="mxfp8",
            dtype=torch.bfloat16,
            hf_config=None,
        )
        vars(runner).update(
            model=model,
            model_config=config,
            device="cpu",
            gpu_id=0,
            load_config=LoadConfig(),
        )
        before = parameters(model)
        path = self.write(with_byte(self.b, UP_SCALE, 255))
        success, message = runner.update_weights_from_disk(path, "auto")
        self.assertFalse(success)
        self.assertRegex(message, f"{UP_SCALE} holds NaN.*\n.*Rolling back")
        self.assertEqual(config.model_path, self.served)
        for name, tensor in parameters(model).items():
            self.assertTrue(torch.equal(tensor, before[name]), name)


class TestAnotherModel(CheckTestCase):
    def test_layers_that_lora_wrapped(self):
        model = load_on_cpu(self.served)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LinearBase):
                replace_submodule(model, name, get_lora_layer(layer, None))
        self.assert_update_is_refused(model, "weight_scale_inv")

    def test_a_module_that_got_another_name(self):
        model = load_on_cpu(self.served)
        layer = model.model.layers[0]
        layer.wrapper = torch.nn.ModuleList([layer.mlp])
        del layer.mlp
        self.assert_update_is_refused(model, "model.layers.0.mlp.down_proj.weight")

    def assert_update_is_refused(self, model, name: str) -> None:
        reason = f"gave up or renamed .*{name}"
        before = {n: as_bytes(p.data.clone()) for n, p in model.named_parameters()}
        with self.assertRaisesRegex(UpdateRefused, reason):
            model.load_weights(self.b.items())
        self.assertRegex(self.disk_update(model, self.write(self.b)), reason)
        for n, param in model.named_parameters():
            self.assertTrue(torch.equal(as_bytes(param.data), before[n]), n)


class TestAsNumbers(CheckTestCase):
    def test_numbers_are_not_copied_into_bytes(self):
        model = load_on_cpu(self.served)
        for name, dtype in (
            (DOWN, torch.bfloat16),
            (DOWN, torch.float32),
            (UP_SCALE, torch.float16),
        ):
            bad = {**self.b, name: self.b[name].to(torch.float32).to(dtype)}
            with self.subTest(name, dtype=dtype), self.refused(
                model, f"{name}.*{dtype}"
            ):
                model.load_weights(bad.items())

    def test_bytes_are_not_copied_into_numbers(self):
        model = load_on_cpu(self.served)
        with self.refused(model, f"{NORM} is torch.float8_e4m3fn.*not quantized here"):
            model.load_weights([(NORM, self.b[DOWN][0, :512].contiguous())])


class TestTaken(CheckTestCase):
    """What a request says of the tensors that nobody takes."""

    def run(self, result=None):
        self.group = torch.distributed.group.WORLD
        return super().run(result)

    def test_an_update_that_takes_nothing_is_refused(self):
        model = load_on_cpu(self.served)
        with self.refused(model, "takes nothing of 1 tensors: model.no_such.weight"):
            model.load_weights([("model.no_such.weight", self.b[DOWN])])

    def test_a_success_lists_what_was_not_taken(self):
        model = load_on_cpu(self.served)

        def update():
            model.load_weights([(DOWN, self.b[DOWN]), ("a.b", self.b[DOWN])])
            return True, "Success."

        success, message = run_weight_update(self.group, update)
        self.assertTrue(success)
        self.assertEqual(message, "Success. Not taken: a.b.")

    def test_a_draft_may_take_none_or_all(self):
        def update():
            note_taken(["a"], ["b", "c"])  # the draft
            note_taken(["b"], ["a", "c"])
            return True, "Success."

        _, message = run_weight_update(self.group, update)
        self.assertEqual(message, "Success. Not taken: c.")

    def test_a_failure_says_what_was_written(self):
        def fail(agree: bool):
            if agree:
                agree_to_write(None)
            raise KeyError("x")

        def refuse():
            agree_to_write(ValueError("no"))

        for update, args, said, unsaid in (
            (fail, (True,), "may be partially updated", "Nothing was written"),
            (fail, (False,), "'x'", "written|partially"),
            (refuse, (), "no. Nothing was written", "partially"),
        ):
            success, message = run_weight_update(self.group, update, *args)
            self.assertFalse(success)
            self.assertRegex(message, said)
            self.assertNotRegex(message, unsaid)


class TestTwoThreadsAgree(CustomTestCase):
    """The protocol alone; its gather is a barrier of two threads, for the real gloo group
    of test_mxfp8_loader_branches.py."""

    def run_ranks(self, *updates):
        barrier, said, results = threading.Barrier(2, timeout=10), [[], []], [None] * 2

        def gather(rank):
            def all_gather_object(into, value, group):
                said[rank].append(value)
                barrier.wait()
                into[:] = [said[0][-1], said[1][-1]]
                barrier.wait()

            return all_gather_object

        local = threading.local()

        def run(rank):
            local.gather = gather(rank)
            results[rank] = run_weight_update(None, updates[rank])

        with mock.patch.multiple(
            torch.distributed,
            get_world_size=lambda group: 2,
            all_gather_object=lambda *args, **kwargs: local.gather(*args, **kwargs),
        ):
            threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return results

    def test_a_target_that_one_rank_refuses_is_written_by_none(self):
        written = []

        def update(refusal):
            def run():
                for model, reason in (("draft", None), ("target", refusal)):
                    agree_to_write(reason)
                    written.append(model)
                return True, "Success."

            return run

        results = self.run_ranks(update(None), update(ValueError("not on rank 1")))
        self.assertEqual(written, ["draft", "draft"])
        for success, message in results:
            self.assertFalse(success)
            self.assertRegex(message, "not on rank 1.*may be partially updated")

    def test_a_rank_that_fails_between_two_models_stops_the_other(self):
        def fail():
            agree_to_write(None)
            raise OSError("lost")

        def go_on():
            agree_to_write(None)
            agree_to_write(None)
            raise AssertionError("written")

        for success, message in self.run_ranks(fail, go_on):
            self.assertFalse(success)
            self.assertIn("lost", message)


class TestChecksThatCannotRun(CheckTestCase):
    def test_a_model_that_meta_cannot_build(self):
        init = LlamaForCausalLM.__init__

        def reads_a_number(model, *args, **kwargs):
            init(model, *args, **kwargs)
            model.lm_head.weight.data.view(-1)[0].item()

        with mock.patch.object(LlamaForCausalLM, "__init__", reads_a_number):
            for load_format in ("auto", "dummy"):
                with self.subTest(load_format), self.assertRaisesRegex(
                    RuntimeError, "meta device.*SGLANG_MXFP8_ACCEPT_UNCHECKED=1"
                ):
                    load_on_cpu(self.served, load_format=load_format)
            with envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True):
                model = load_on_cpu(self.served)
                model.load_weights(self.b.items())
                self.assertIsNone(self.disk_update(model, self.served))

    def test_an_operation_that_meta_lacks(self):
        model = load_on_cpu(self.served)
        loads = LlamaForCausalLM.load_weights

        def reads_numbers(model, weights):
            weights = list(weights)
            weights[0][1].view(torch.uint8).view(-1)[0].tolist()
            return loads(model, weights)

        meta = model.mxfp8_update_check._model
        meta.load_weights = lambda weights: reads_numbers(meta, weights)
        with self.refused(model, "SGLANG_MXFP8_ACCEPT_UNCHECKED=1"):
            model.load_weights(self.b.items())

    def test_one_copy_serves_the_start_and_every_update(self):
        with mock.patch.object(
            lifecycle, "UpdateCheck", side_effect=UpdateCheck
        ) as made:
            model = load_on_cpu(self.served)
            model.load_weights(self.b.items())
            self.disk_update(model, self.served)
        self.assertEqual(made.call_count, 1)

    def test_the_copy_is_built_where_the_model_is(self):
        """Inside the contexts of a draft (its tensor parallel group, its MoE backend)."""
        inside, seen = [], []
        init = LlamaForCausalLM.__init__

        def note(model, *args, **kwargs):
            seen.append(bool(inside))
            init(model, *args, **kwargs)

        with mock.patch.object(LlamaForCausalLM, "__init__", note):
            for load_format in ("auto", "dummy"):
                inside.append(1)
                model = load_on_cpu(self.served, load_format=load_format)
                inside.clear()
                model.load_weights(self.b.items())
        self.assertEqual(seen, [True] * 4)


# DeepSeek-V3's layers, by default a few of them: MXFP8_TEST_LAYERS=61 is the model.
LAYERS = int(os.environ.get("MXFP8_TEST_LAYERS", 4))
DEEPSEEK = dict(
    num_hidden_layers=LAYERS,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    max_position_embeddings=163840,
    # A CPU's rotary embedding for MLA takes no other.
    rope_scaling=dict(
        type="yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)


def deepseek_tensors(config: DeepseekV3Config) -> dict:
    """Every tensor of an MXFP8 checkpoint of DeepSeek-V3, on the meta device."""
    hidden, found = config.hidden_size, {}

    def add(name: str, *shape: int, dtype=torch.bfloat16):
        found[name] = torch.empty(shape, dtype=dtype, device="meta")

    def linear(name: str, n: int, k: int):
        add(f"{name}.weight", n, k, dtype=torch.float8_e4m3fn)
        add(f"{name}.weight_scale_inv", n, k // 32, dtype=torch.uint8)

    def mlp(name: str, inner: int):
        linear(f"{name}.gate_proj", inner, hidden)
        linear(f"{name}.up_proj", inner, hidden)
        linear(f"{name}.down_proj", hidden, inner)

    add("model.embed_tokens.weight", config.vocab_size, hidden)
    add("lm_head.weight", config.vocab_size, hidden)
    add("model.norm.weight", hidden)
    heads = config.num_attention_heads
    q_rank, kv_rank = config.q_lora_rank, config.kv_lora_rank
    for i in range(config.num_hidden_layers):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        add(f"{layer}.input_layernorm.weight", hidden)
        add(f"{layer}.post_attention_layernorm.weight", hidden)
        linear(f"{attention}.q_a_proj", q_rank, hidden)
        linear(f"{attention}.q_b_proj", heads * config.qk_head_dim, q_rank)
        linear(
            f"{attention}.kv_a_proj_with_mqa", kv_rank + config.qk_rope_head_dim, hidden
        )
        linear(
            f"{attention}.kv_b_proj",
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            kv_rank,
        )
        linear(f"{attention}.o_proj", hidden, heads * config.v_head_dim)
        add(f"{attention}.q_a_layernorm.weight", q_rank)
        add(f"{attention}.kv_a_layernorm.weight", kv_rank)
        if i < config.first_k_dense_replace:
            mlp(f"{layer}.mlp", config.intermediate_size)
            continue
        inner, experts = config.moe_intermediate_size, config.n_routed_experts
        add(f"{layer}.mlp.gate.weight", experts, hidden)
        add(f"{layer}.mlp.gate.e_score_correction_bias", experts, dtype=torch.float32)
        mlp(f"{layer}.mlp.shared_experts", inner)
        for expert in range(experts):
            mlp(f"{layer}.mlp.experts.{expert}", inner)
    return found


class TestDeepseekV3(CustomTestCase):
    """Its real shapes, on the meta device only."""

    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.enterClassContext(fp8_gemm_backend("flashinfer_trtllm"))
        cls.enterClassContext(
            mock.patch.object(Fp8Config, "_require_mxfp8_experts", lambda *_: None)
        )
        config = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], **DEEPSEEK)
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(directory, {}, **config.to_dict())
            args = ServerArgs(
                model_path=directory, device="cpu", skip_tokenizer_init=True
            )
            set_global_server_args_for_scheduler(args)
            model_config = ModelConfig.from_server_args(args)
        cls.tensors = list(deepseek_tensors(config).items())
        cls.check = UpdateCheck(
            functools.partial(
                build_on_meta,
                _initialize_model,
                model_config,
                LoadConfig(),
                mxfp8_config(weight_block_size=[1, 32]),
            ),
            not_needed=(RadixAttention,),
        )
        cls.check.follow(cls.check._model)

    def whole(self, tensors):
        return self.check._load(tensors, whole=True)

    def test_a_whole_checkpoint(self):
        taken, untaken = self.whole(self.tensors)
        self.assertEqual((len(taken), untaken), (len(self.tensors), []))

    def test_one_part_of_an_expert_is_missing(self):
        name = f"model.layers.{LAYERS - 1}.mlp.experts.7.up_proj"
        for last in ("weight", "weight_scale_inv"):
            left = [named for named in self.tensors if named[0] != f"{name}.{last}"]
            with self.assertRaisesRegex(
                UpdateRefused, "experts.w13_weight|lacks the scale"
            ):
                self.whole(left)

    def test_experts_are_not_updated_in_memory(self):
        bucket = [named for named in self.tensors if ".experts.7." in named[0]][:4]
        with self.assertRaisesRegex(
            UpdateRefused, "whole update from disk .*experts: model.layers.*experts.7"
        ):
            self.check.tensors(self.check._model, bucket)
        parameter = next(
            n for n, _ in self.check._model.named_parameters() if "w13_weight" in n
        )
        with self.assertRaisesRegex(UpdateRefused, f"whole update .*{parameter}"):
            load_mxfp8_tensors_directly(self.check._model, [(parameter, None)])
        others = [n for n in self.tensors if ".mlp.experts." not in n[0]]
        self.check.tensors(self.check._model, others)

    def test_numbers_are_not_copied_into_the_bytes_of_experts(self):
        name = f"model.layers.{LAYERS - 1}.mlp.experts.7.up_proj.weight"
        bad = {**dict(self.tensors)}
        bad[name] = bad[name].to(torch.bfloat16)
        with self.assertRaisesRegex(UpdateRefused, f"{name} is torch.bfloat16"):
            self.whole(list(bad.items()))

    def test_what_the_check_costs(self):
        """Beside the model's own loads on the meta device, in one run."""
        own, first, second = [], [], []

        def seconds(function, *args) -> float:
            begin = time.process_time()
            function(*args)
            return time.process_time() - begin

        def load():
            fresh = (
                (name, torch.empty(t.shape, dtype=t.dtype, device="meta"))
                for name, t in self.tensors
            )
            self.check._model.load_weights(fresh)

        for _ in range(3 if LAYERS > 8 else 7):
            own.append(seconds(load))
            self.check._passed.clear()
            first.append(seconds(self.whole, self.tensors))
            second.append(seconds(self.whole, self.tensors))
        own, first, second = map(min, (own, first, second))
        print(
            f"{len(self.tensors)} tensors: own load {own:.2f} s, "
            f"check {first / own:.2f}x, the same again {second / first:.1%}"
        )
        self.assertLess(first, 1.5 * own)
        self.assertLess(second, 0.05 * first)


if __name__ == "__main__":
    unittest.main()
