"""What no MXFP8 model takes, at start or in an update, on a CPU: real loaders, tiny models.

Kernels are emulated. That experts are in MXFP8, which only SM100 runs, is patched by name;
nothing here runs them.
"""

import functools
import json
import os
import time
import unittest
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import save_file

from sglang.srt import server_args
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.environ import envs
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.mxfp8 import agreement, lifecycle
from sglang.srt.layers.quantization.mxfp8.finite import refuse_non_finite
from sglang.srt.layers.quantization.mxfp8.layout import swizzle_scale
from sglang.srt.layers.quantization.mxfp8.meta import build_on_meta
from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.srt.layers.quantization.mxfp8.update_check import UpdateCheck
from sglang.srt.lora.layers import get_lora_layer
from sglang.srt.model_loader.loader import DefaultModelLoader, _initialize_model
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.utils import replace_submodule
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TINY_LLAMA,
    TinyModelTestCase,
    deepseek_v3,
    fused_parameters,
    load_on_cpu,
    model_runner,
    mxfp8_config,
    mxfp8_state,
    same_bytes,
    server_model_config,
    with_bf16,
    without,
    write_past_the_loaders,
)

register_cpu_ci(est_time=30, suite="default")

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
UP_SCALE = f"{UP}_scale_inv"
ATTENTION = "model.layers.1.self_attn"
K_PROJ = f"{ATTENTION}.k_proj.weight"
K_SCALE = f"{K_PROJ}_scale_inv"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
QKV = "layers.1.self_attn.qkv_proj.weight"
CACHE_SCALE = f"{ATTENTION}.attn.k_scale"
INDEX = "model.safetensors.index.json"
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
ONE_SCALE = torch.tensor(0.25)


def changed(tensors: dict, changes: dict) -> dict:
    """The tensors with some others, and without those that are None."""
    return {n: t for n, t in {**tensors, **changes}.items() if t is not None}


def with_byte(tensors: dict, name: str, byte: int) -> dict:
    """The tensors, with one byte of one of them changed."""
    tensor = tensors[name].clone()
    tensor.view(torch.uint8).view(-1)[-1] = byte
    return {**tensors, name: tensor}


class TestWhole(TinyModelTestCase):
    """What does not fill the model, or does not fit, is refused by its headers: at start
    and as an update from disk. Layer 0 is in bf16, and the head is not tied."""

    changes = {}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        kept = ["layers.0."]
        own = {**TINY_LLAMA["quantization_config"], "modules_to_not_convert": kept}
        cls.changes = dict(tie_word_embeddings=False, quantization_config=own)
        head = {"lm_head.weight": cls.b[EMBEDDING].clone()}
        cls.a, cls.b = ({**with_bf16(t, *kept), **head} for t in (cls.a, cls.b))
        cls.model = load_on_cpu(cls.write(cls.a))

    @classmethod
    def write(cls, tensors: dict) -> str:
        return super().write(tensors, **cls.changes)

    def assert_refused(self, path: str, reason: str) -> None:
        read = mock.patch.object(DefaultModelLoader, "_get_weights_iterator")
        with self.subTest(start=reason), read as iterator:
            with self.assertRaisesRegex(ValueError, reason):
                load_on_cpu(path)
            iterator.assert_not_called()
        with self.subTest(update=reason):
            refusal = self.refusal_of(self.model, path)
            self.assertRegex(refusal, f"{reason}.*Nothing was written")

    def test_a_model_that_is_not_filled(self):
        for lost, parameter in (
            (EMBEDDING, EMBEDDING),
            ("model.norm", "model.norm.weight"),
            (NORM, NORM),
            ("lm_head", "lm_head.weight"),
            ("layers.1.", QKV),
            (f"{ATTENTION}.k_proj", QKV),
            ("layers.1.mlp.down_proj", "layers.1.mlp.down_proj.weight"),
            ("layers.0.self_attn.v_proj", "layers.0.self_attn.qkv_proj.weight"),
            ("layers.0.mlp.up_proj", "layers.0.mlp.gate_up_proj.weight"),
            ("layers.0.mlp.down_proj", "layers.0.mlp.down_proj.weight"),
        ):
            path = self.write(without(self.b, lost))
            self.assert_refused(path, f"does not fill.*{parameter}")
        path = self.write(changed(self.b, {K_PROJ: None}))
        self.assert_refused(path, f"does not fill.*{QKV}")

    def test_tensors(self):
        """These are refused by a model's loaders, too."""
        weight, scale, e4m3 = self.b[K_PROJ], self.b[K_SCALE], "torch.float8_e4m3fn"
        swizzled = swizzle_scale(scale, shuffle=False)
        embedding = {EMBEDDING: self.b[EMBEDDING].to(FP8)}
        embedding[f"{EMBEDDING}_scale_inv"] = torch.ones(1)
        in_bf16 = {K_PROJ: weight.to(BF16), K_SCALE: None}
        for reason, changes in (
            (f"lacks the scale of {K_PROJ}", {K_SCALE: None}),
            (rf"{K_SCALE}.*got \[2048\]: it looks swizzled", {K_SCALE: swizzled}),
            (rf"{K_SCALE}.*\[64, 16\], got \[64, 8\]", {K_SCALE: scale[:, :8].clone()}),
            (f"{K_SCALE}.*torch.uint8, got torch.float32", {K_SCALE: scale.float()}),
            (rf"{K_PROJ}.*\[64, 512\], got \[32, 512\]", {K_PROJ: weight[:32].clone()}),
            (rf"{K_PROJ}.*got \[64, 256\]", {K_PROJ: weight[:, ::2].clone()}),
            (f"{K_PROJ}.*{e4m3}, got torch.bfloat16.*list the layer", in_bf16),
            (r"\[7\].*\[512\]", {NORM: torch.ones(7).to(BF16)}),
            (f"{NORM}.* is {e4m3}.*not quantized here", {NORM: weight[0].clone()}),
            (f"{EMBEDDING}.*{e4m3}, but its layer is not", embedding),
            (f"{UP_SCALE} comes twice", {f"{UP}_scale": self.b[UP_SCALE].clone()}),
        ):
            tensors = changed(self.b, changes)
            self.assert_refused(self.write(tensors), reason)
            if K_SCALE in tensors:
                with self.subTest(memory=reason), self.refused(self.model, reason):
                    self.model.load_weights(tensors.items())

    def test_scales_that_nothing_takes(self):
        kinds = "key_scale k_cache_scale q_scale k_scale_inv k_proj.k_scales"
        kinds = *kinds.split(), "attn.kv_cache_scale", "k_proj.weight_scale_2"
        for name in (f"{ATTENTION}.{kind}" for kind in kinds):
            path = self.write({**self.b, name: ONE_SCALE})
            self.assert_refused(path, f"but not {name}")
        # Of what the model does not load.
        names = "model.mtp.fc.weight_scale", "logit_scale", "model.layers.2.k_scale_inv"
        path = self.write({**self.b, **{name: ONE_SCALE.clone() for name in names}})
        self.assertEqual(self.refusal_of(self.model, path), "")

    def write_with_index(self, tensors: dict, **files: str) -> str:
        """A checkpoint whose index has some tensors in other files than its own."""
        path = self.write(tensors)
        weight_map = {**dict.fromkeys(self.b, "model.safetensors"), **files}
        Path(path, INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return path

    def test_files(self):
        lost = {EMBEDDING: "model-00002.safetensors"}
        path = self.write_with_index(without(self.b, "embed"), **lost)
        self.assert_refused(path, "embed_tokens.weight in model-00002.safetensors")

        path = self.write_with_index(self.b, extra="other.safetensors")
        twin = {DOWN: self.a[DOWN], "extra": torch.ones(1)}
        save_file(twin, f"{path}/other.safetensors")
        reason = f"{DOWN} stands in .*(model|other).*and in .*(model|other).safetensors"
        self.assert_refused(path, reason)
        os.remove(f"{path}/{INDEX}")
        self.assert_refused(path, reason)

        path = self.write(self.b)
        for weight_map in b"{}", b'{"a": 1}', b"[]", b'{"a": ""}':
            for content in b"", weight_map, b'{"weight_map": %b}' % weight_map:
                Path(path, INDEX).write_bytes(content)
                self.assert_refused(path, f"{INDEX} is no index .*Fetch it again")

        another = {f"another.{name}": tensor for name, tensor in self.b.items()}
        path = self.write(another)
        self.assert_refused(path, "takes nothing of .* tensors")
        file = f"{path}/model.safetensors"
        os.truncate(file, os.path.getsize(file) // 2)
        self.assert_refused(path, "cannot be read")

    def test_folders_that_are_not_there(self):
        no_hub = mock.Mock(side_effect=OSError("no hub"))
        with mock.patch.object(DefaultModelLoader, "_prepare_weights", no_hub):
            for path, reason in (
                ("/no/such/folder", "there is no such folder"),
                ("models/foo", "there is no such folder here.*no hub"),
            ):
                refusal = self.refusal_of(self.model, path)
                self.assertRegex(refusal, f"{reason}.*Nothing was written")

    def test_what_a_model_need_not_take_is_no_reason(self):
        more = {"model.mtp.fc.weight": self.b[DOWN].clone(), "x.weight": torch.ones(9)}
        stale = {"model.rotary.inv_freq": "model.safetensors"}
        path = self.write_with_index({**self.b, **more}, **stale)
        self.assert_serves(load_on_cpu(path), self.b)
        self.assertEqual(self.refusal_of(self.model, path), "")
        path = self.write({**self.b, **more})
        self.assertEqual(self.refusal_of(self.model, path), "")
        only = dict(name_filter=lambda name: "layers.1" in name)
        path = self.write({n: t for n, t in self.b.items() if "layers.1" in n})
        self.assertEqual(self.refusal_of(self.model, path, **only), "")


class TestInMemory(TinyModelTestCase):
    """Nothing is written of an update in memory of which one tensor cannot be."""

    def ways(self, model, tensors: dict) -> tuple:
        """The ways to write in memory, each with the tensors as it takes them."""
        fused = fused_parameters(tensors)
        raw_loader = lifecycle.as_mxfp8_raw_loader(write_past_the_loaders)
        direct = functools.partial(lifecycle.load_mxfp8_tensors_directly, model)
        return (
            (model.load_weights, tensors),
            (lambda sent: model.load_weights(named for named in sent), tensors),
            (direct, fused),
            (lambda sent: raw_loader(model, list(sent)), fused),
        )

    def assert_undone(self, model, tensors: dict, reason: str) -> None:
        """An update from disk, which reads numbers as it writes, goes back."""
        config = self.config_of(self.path_a)
        runner = model_runner(model, model_config=config, load_config=LoadConfig())
        success, message = runner.update_weights_from_disk(self.write(tensors), "auto")
        self.assertFalse(success)
        self.assertRegex(message, f"{reason}.*\n.*Rolling back")
        self.assertEqual(runner.model_config.model_path, self.path_a)
        self.assert_serves(model, self.a)

    def test_nan(self):
        model = load_on_cpu(self.path_a)
        for name, byte in ((UP_SCALE, 255), (DOWN, 0x7F), (DOWN, 0xFF)):
            bad = with_byte(self.b, name, byte)
            as_bytes = {**bad, DOWN: bad[DOWN].view(torch.uint8)}
            for sent in bad, as_bytes:
                with self.assertRaisesRegex(ValueError, f"{name} holds NaN"):
                    load_on_cpu(self.write(sent))
                for way, (update, tensors) in enumerate(self.ways(model, sent)):
                    with self.subTest(name=name, byte=byte, way=way):
                        with self.refused(model, "holds NaN"):
                            update(tensors.items())
        self.assert_undone(model, with_byte(self.b, UP_SCALE, 255), "holds NaN")

        nan = torch.full((2, 3, 4), 255, dtype=torch.uint8)
        for name, scale in (
            ("gate_up_proj_weight_scale_inv", nan),
            ("down_proj_scale_inv", nan),
            ("any_name", nan.view(torch.float8_e8m0fnu)),
        ):
            with self.assertRaisesRegex(ValueError, f"experts.{name} holds NaN"):
                refuse_non_finite([(f"experts.{name}", scale)])

    def test_the_largest_numbers_are_taken(self):
        tensors = with_byte(with_byte(self.b, DOWN, 0xFE), UP_SCALE, 254)
        model = load_on_cpu(self.write(with_byte(tensors, K_PROJ, 0x7E)))
        model.load_weights(tensors.items())

    def test_scales_of_a_kv_cache(self):
        model = load_on_cpu(self.path_a)
        attn = model.model.layers[1].self_attn.attn
        args = server_args.get_global_server_args()
        graphs = functools.partial(mock.patch.multiple, args, device="cuda")
        for update, tensors in self.ways(model, self.b):
            for value in (float("nan"), -1.0, 0.0):
                bad = {**tensors, CACHE_SCALE: torch.tensor(value)}
                with self.refused(model, f"{CACHE_SCALE} is .*: a scale is a positive"):
                    update(bad.items())
            half = {CACHE_SCALE: torch.tensor(0.5)}
            with graphs(disable_cuda_graph=False):
                update([(CACHE_SCALE, torch.tensor(1.0))])
                reason = f"{CACHE_SCALE} changes .*--disable-cuda-graph"
                with self.refused(model, reason):
                    update({**tensors, **half}.items())
            with graphs(disable_cuda_graph=True):
                update(half.items())
            self.assertEqual((attn.k_scale.item(), attn.k_scale_float), (0.5, 0.5))
            self.assertIn("would keep (0.5", self.refusal_of(model, self.path_b))
            self.assertEqual(self.refusal_of(model, self.write({**self.b, **half})), "")
            update([(CACHE_SCALE, torch.tensor(1.0))])
        with graphs(disable_cuda_graph=False):
            self.assert_undone(model, {**self.b, **half}, f"{CACHE_SCALE} changes")

        path = self.write({**self.b, f"{ATTENTION}.v_scale": torch.ones(1)})
        with self.assertRaisesRegex(ValueError, "1.self_attn.attn has a scale for"):
            load_on_cpu(path)

    def test_numbers_that_are_quantized_on_load(self):
        in_bf16 = {n: t.to(BF16) for n, t in without(self.a, "scale").items()}
        path = self.write(in_bf16, quantization_config=None)
        model = load_on_cpu(path, quantization="mxfp8")
        self.a = dict(in_bf16)  # what `refused` expects
        for name in without(in_bf16, "norm", "embed"):
            self.a[name], self.a[f"{name}_scale_inv"] = quantize(in_bf16[name])
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = {**in_bf16, DOWN: in_bf16[DOWN].clone()}
            bad[DOWN][3, 4] = value
            with self.subTest(value), self.refused(model, DOWN):
                model.load_weights(bad.items())
            path = self.write(bad, quantization_config=None)
            with self.assertRaisesRegex(ValueError, f"{DOWN} holds NaN or infinity"):
                load_on_cpu(path, quantization="mxfp8")

    def test_what_does_not_fit(self):
        """More in TestWhole.test_tensors."""
        model, weight = load_on_cpu(self.path_a), self.b[UP]
        renamed = {f"{UP}_scale_2": self.b[UP_SCALE], UP_SCALE: None}
        in_fp8 = "is torch.float8_e4m3fn.*not quantized here"
        loaders, _, direct, _ = self.ways(model, self.b)
        for (update, tensors), reason, changes in (
            (loaders, "is called weight_scale_inv", renamed),
            (direct, "comes twice", {f"{DOWN}_scale": self.b[f"{DOWN}_scale_inv"]}),
            (direct, "has no parameter nothing", {"nothing": weight}),
            (direct, "got torch.bfloat16", {DOWN: self.b[DOWN].to(BF16)}),
            (direct, r"is \[512\], got \[7\]", {NORM: torch.ones(7).to(BF16)}),
            (direct, in_fp8, {NORM: weight[0].clone()}),
        ):
            with self.subTest(reason), self.refused(model, reason):
                update(changed(tensors, changes).items())

    def test_what_was_not_taken(self):
        """As the request says it. Of a failure: test_mxfp8_two_processes.py."""
        model = load_on_cpu(self.path_a)
        with self.refused(model, "takes nothing of 1 tensors: a.b"):
            model.load_weights([("a.b", self.b[DOWN])])
        with self.refused(model, "the update has no tensors"):
            model.load_weights([])

        def load():
            model.load_weights((n, self.b[DOWN]) for n in (DOWN, "a.b", "c.d"))
            agreement.note_taken(["a.b"], [DOWN, "c.d"])  # a draft
            return True, "Success."

        world = torch.distributed.group.WORLD
        answer = agreement.run_weight_update(world, load)
        self.assertEqual(answer, (True, "Success. Not taken: c.d."))


class TestTheCopyOnMeta(TinyModelTestCase):
    def built_with(self, also):
        """Llama, which calls `also(model)` at the end of its constructor."""
        init = LlamaForCausalLM.__init__

        def init_and_more(model, *args, **kwargs):
            init(model, *args, **kwargs)
            also(model)

        return mock.patch.object(LlamaForCausalLM, "__init__", init_and_more)

    def wrap_by_lora(self, model):
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LinearBase):
                replace_submodule(model, name, get_lora_layer(layer, None))

    def rename(self, model):
        layer = model.model.layers[0]
        layer.wrapper = torch.nn.ModuleList([layer.mlp])
        del layer.mlp

    def test_a_model_that_got_other_names_is_not_updated(self):
        for change, name in ((self.wrap_by_lora, "scale_inv"), (self.rename, DOWN)):
            model = load_on_cpu(self.path_a)
            change(model)
            reason = f"gave up or renamed .*{name}"
            held = list(model.parameters())
            before = [param.clone() for param in held]
            with self.subTest(name):
                with self.assertRaisesRegex(agreement.UpdateRefused, reason):
                    model.load_weights(self.b.items())
                self.assertRegex(self.refusal_of(model, self.path_b), reason)
                self.assertTrue(all(map(same_bytes, held, before)))

    def test_a_model_that_meta_cannot_build(self):
        def read_a_number(model):
            model.lm_head.weight.data.view(-1)[0].item()

        with self.built_with(read_a_number):
            for load_format in ("auto", "dummy"):
                with self.subTest(load_format), self.assertRaisesRegex(
                    RuntimeError, "meta device.*item.*SGLANG_MXFP8_ACCEPT_UNCHECKED=1"
                ):
                    load_on_cpu(self.path_a, load_format=load_format)
            with envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True):
                model = load_on_cpu(self.path_a)
                model.load_weights(self.b.items())
                self.assertEqual(self.refusal_of(model, self.path_a), "")

    def test_models_that_read_numbers_of_their_own(self):
        """As they are built: InternVL's rates, XIELU's in Apertus, which loads more."""
        seen = []

        def read_numbers(model):
            beta = torch.nn.Parameter(torch.tensor(0.5)).detach()
            rates = [x.item() for x in torch.linspace(0, 1, 3)]
            seen.append((beta.cpu().item(), float(beta), bool(beta > 0), rates))

        with self.built_with(read_numbers):
            self.assert_updates(load_on_cpu(self.path_a))
        self.assertEqual(seen, [(0.5, 0.5, True, [0, 0.5, 1])] * 2)
        small = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
        small |= dict(num_attention_heads=4, vocab_size=320)
        config = transformers.ApertusConfig(**small)
        load_on_cpu(self.saved(transformers.ApertusForCausalLM(config)), "mxfp8")

    def test_an_encoder_has_a_parameter_that_nothing_reads(self):
        config = transformers.BertConfig(64, 64, 1, 2, 128, max_position_embeddings=64)
        model = load_on_cpu(self.saved(transformers.BertModel(config)), "mxfp8")
        self.assertIn("embeddings.position_ids", dict(model.named_parameters()))

    def saved(self, model) -> str:
        path = f"{self.directory}/{type(model).__name__}"
        model.to(BF16).save_pretrained(path)
        return path

    def test_an_operation_that_meta_lacks(self):
        loads = LlamaForCausalLM.load_weights

        def reads_numbers(model, weights):
            weights = list(weights)
            if len(weights) == 1:  # not at start
                weights[0][1].view(torch.uint8).view(-1)[0].tolist()
            return loads(model, weights)

        with mock.patch.object(LlamaForCausalLM, "load_weights", reads_numbers):
            model = load_on_cpu(self.path_a)
        with self.refused(model, "SGLANG_MXFP8_ACCEPT_UNCHECKED=1"):
            model.load_weights([(DOWN, self.b[DOWN])])

    def test_it_is_built_once_and_where_the_model_is(self):
        """Inside the contexts of a draft (its tensor parallel group, its MoE backend)."""
        inside, seen = [], []
        with self.built_with(lambda model: seen.append(bool(inside))):
            for load_format in ("auto", "dummy"):
                inside.append(1)
                model = load_on_cpu(self.path_a, load_format=load_format)
                inside.clear()
                model.load_weights(self.b.items())
                self.refusal_of(model, self.path_a)
        self.assertEqual(seen, [True] * 4)  # each the model and its copy


# DeepSeek-V3's layers, by default a few of them: MXFP8_TEST_LAYERS=61 is the model.
LAYERS = int(os.environ.get("MXFP8_TEST_LAYERS", 4))
EXPERT = f"model.layers.{LAYERS - 1}.mlp.experts.7"


class TestDeepseekV3(TinyModelTestCase):
    """Its real shapes, on the meta device only."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.enterClassContext(
            mock.patch.object(Fp8Config, "_require_mxfp8_experts", lambda *_: None)
        )
        config = deepseek_v3(num_hidden_layers=LAYERS, first_k_dense_replace=1)
        with torch.device("meta"):
            model = transformers.DeepseekV3ForCausalLM(config)
        cls.tensors = list(mxfp8_state(model, cls.quantize_shape).items())
        model_config = server_model_config(cls.write({}, **config.to_dict()))
        configs = model_config, LoadConfig(), mxfp8_config(weight_block_size=[1, 32])
        build = functools.partial(build_on_meta, _initialize_model, *configs)
        cls.check = UpdateCheck(build, model_config, is_stage=False)
        cls.check.follow(cls.check._model)

    @staticmethod
    def quantize_shape(tensor):
        return tensor.to(FP8), tensor[:, ::32].to(torch.uint8)

    def whole(self, tensors):
        return self.check._load(tensors, whole=True)

    def test_a_whole_checkpoint(self):
        taken, untaken = self.whole(self.tensors)
        self.assertEqual((len(taken), untaken), (len(self.tensors), []))

    def test_one_part_of_an_expert_does_not_fit(self):
        name = f"{EXPERT}.up_proj.weight"
        for changed, tensor, reason in (
            (name, None, "experts.w13_weight"),
            (f"{name}_scale_inv", None, "lacks the scale"),
            (name, torch.empty(2048, 7168, dtype=BF16), f"{name} is torch.bfloat16"),
        ):
            tensors = {**dict(self.tensors), changed: tensor}
            tensors = [named for named in tensors.items() if named[1] is not None]
            with self.assertRaisesRegex(agreement.UpdateRefused, reason):
                self.whole(tensors)

    def test_experts_are_not_updated_in_memory(self):
        model = self.check._model
        bucket = [named for named in self.tensors if EXPERT in named[0]]
        reason = f"whole update from disk .*experts: {EXPERT}"
        with self.assertRaisesRegex(agreement.UpdateRefused, reason):
            self.check.tensors(model, bucket)
        parameter = next(n for n, _ in model.named_parameters() if "w13_weight" in n)
        with self.assertRaisesRegex(
            agreement.UpdateRefused, f"whole update .*{parameter}"
        ):
            lifecycle.load_mxfp8_tensors_directly(model, [(parameter, None)])
        others = [named for named in self.tensors if ".mlp.experts." not in named[0]]
        self.check.tensors(model, others)

    def test_what_the_check_costs(self):
        """Beside the model's own load on the meta device; the same again is not run."""

        def seconds(function, tensors) -> float:
            begin = time.process_time()
            function(tensors)
            return time.process_time() - begin

        own, check = [], []
        for _ in range(4):
            fresh = ((name, torch.empty_like(t)) for name, t in self.tensors)
            own.append(seconds(self.check._model.load_weights, fresh))
            self.check._passed.clear()
            check.append(seconds(self.whole, self.tensors))
        self.assertLess(min(check), 1.5 * min(own))
        with mock.patch.object(self.check._model, "load_weights") as load:
            self.whole(self.tensors)
            load.assert_not_called()


if __name__ == "__main__":
    unittest.main()
