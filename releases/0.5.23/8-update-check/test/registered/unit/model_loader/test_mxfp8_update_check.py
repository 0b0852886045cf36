"""What an MXFP8 model would not take is refused before it is written, from files and from
memory, on all ranks. A CPU serves it by weight_only; no kernel runs."""

import functools
import json
import os
import re
import subprocess
import sys
import unittest
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.model_executor.model_runner_components import weight_updater
from sglang.srt.model_loader.loader import get_model_loader
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.layer_ut_utils import init_single_process_dist, publish_build_topology
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="base-a-test-cpu")

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
LAYERS = [f"model.layers.{i}" for i in range(2)]
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
LINEARS = [*ATTENTION, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
NORMS = ["input_layernorm", "post_attention_layernorm"]
NORMS += ["self_attn.q_norm", "self_attn.k_norm"]
SIZE, HEADS = 128, 2
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": SIZE // HEADS,
    "tie_word_embeddings": True,
    "quantization_config": {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "scale_fmt": "ue8m0",
    },
}
K_PROJ = f"{LAYERS[1]}.self_attn.k_proj.weight"
K_SCALE = f"{K_PROJ}_scale_inv"
DOWN = f"{LAYERS[0]}.mlp.down_proj.weight"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def tensors(seed: int) -> dict:
    """A checkpoint's."""
    generator = torch.Generator().manual_seed(seed)
    found = {EMBEDDING: torch.randn(SIZE, SIZE, generator=generator).to(BF16)}
    for name in ["model.norm", *(f"{layer}.{n}" for layer in LAYERS for n in NORMS)]:
        size = CONFIG["head_dim"] if name[-6:] in ("q_norm", "k_norm") else SIZE
        found[f"{name}.weight"] = torch.randn(size, generator=generator).to(BF16)
    for name in (f"{layer}.{linear}.weight" for layer in LAYERS for linear in LINEARS):
        found[name] = torch.randn(SIZE, SIZE, generator=generator).to(FP8)
        scale = torch.randint(110, 130, (SIZE, SIZE // 32), generator=generator)
        found[f"{name}_scale_inv"] = scale.to(torch.uint8)
    return found


OLD, NEW = tensors(1), tensors(2)


def changed(changes: dict) -> dict:
    """NEW with other tensors, and without those that are None."""
    return {n: t for n, t in {**NEW, **changes}.items() if t is not None}


def with_nan(name: str, byte: int) -> dict:
    tensor = NEW[name].clone()
    tensor.view(torch.uint8)[3, 1] = byte
    return {name: tensor}


# The reason, and what of NEW is then another; None is for a tensor that is not there.
UNFIT = (
    (
        "does not fill.*layers.1.self_attn.qkv_proj.weight",
        {K_PROJ: None, K_SCALE: None},
    ),
    (f"lacks the scale of {K_PROJ}", {K_SCALE: None}),
    (f"does not fill.*{NORM}", {NORM: None}),
)
# Refused in memory, too, where a part of the model may come alone.
WRONG = (
    (f"{DOWN} .*bfloat16, but its parameter holds .*e4m3", {DOWN: NEW[DOWN].to(BF16)}),
    (f"{K_SCALE} .*float32, but", {K_SCALE: NEW[K_SCALE].float()}),
    (f"{DOWN} .*uint8, but", {DOWN: NEW[DOWN].view(torch.uint8)}),
    (f"{EMBEDDING} .*e4m3fn, but", {EMBEDDING: NEW[EMBEDDING].to(FP8)}),
    (f"takes .*down_proj, but not {DOWN}_scale_2", {f"{DOWN}_scale_2": torch.ones(1)}),
    (f"{K_SCALE} comes twice", {f"{K_PROJ}_scale": NEW[K_SCALE].clone()}),
)
# Known by what the model has loaded at start: on a CPU its loaders pad.
SHAPES = (
    (
        rf"{K_PROJ} was \[128, 128\] at start, got \[64",
        {K_PROJ: NEW[K_PROJ][:64].clone()},
    ),
    (rf"{DOWN} was", {DOWN: NEW[DOWN][:, :64].clone()}),
)
NAN = ((f"{K_SCALE} holds NaN", with_nan(K_SCALE, 255)),)
NAN += ((f"{DOWN} holds NaN", with_nan(DOWN, 127)),)


def load(path: str) -> torch.nn.Module:
    config = ModelConfig(path)
    loader = get_model_loader(LoadConfig(), config)
    return loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))


def updater_of(model: torch.nn.Module, path: str):
    nothing = mock.Mock()
    return weight_updater.WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=ModelConfig(path),
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=nothing,
        recapture_cuda_graph=nothing,
        get_model_runner=nothing,
    )


def held(model: torch.nn.Module) -> dict:
    """The bytes that are served."""
    params = model.named_parameters()
    return {n: p.data.contiguous().view(torch.uint8).clone() for n, p in params}


def write(folder: str, tensors: dict) -> str:
    """A new checkpoint in a new folder, since configs are cached by path."""
    os.makedirs(folder)
    save_file(tensors, f"{folder}/model.safetensors")
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
    return folder


def without_a_server() -> ExitStack:
    patches, patch = ExitStack(), functools.partial(mock.patch.object, weight_updater)
    off = SimpleNamespace(weight_cache_mode="off")
    patches.enter_context(patch("get_model", lambda: off))
    patches.enter_context(patch("get_pp_stage_load_group", lambda: None))
    return patches


class TestMxfp8UpdateCheck(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_dist()
        cls.enterClassContext(without_a_server())
        cls.directory = cls.enterClassContext(TemporaryDirectory())
        cls.old, cls.new = cls.write("old", OLD), cls.write("new", NEW)

    @classmethod
    def write(cls, name: str, tensors: dict) -> str:
        return write(f"{cls.directory}/{name}", tensors)

    def setUp(self):
        self.model = load(self.old)
        self.before = held(self.model)
        self.updater = updater_of(self.model, self.old)

    def assert_serves(self, expected: dict) -> None:
        found = held(self.model)
        self.assertEqual(found.keys(), expected.keys())
        for name, data in expected.items():
            self.assertTrue(torch.equal(found[name], data), name)

    def assert_refused(self, answer: tuple, reason: str) -> None:
        self.assertFalse(answer[0])
        self.assertRegex(answer[1], reason)
        self.assert_serves(self.before)

    def send(self, tensors: dict) -> tuple:
        return self.updater.load_weights_from_distributed(list(tensors.items()))

    def test_a_checkpoint_at_start(self):
        for i, (reason, changes) in enumerate(UNFIT + WRONG + NAN):
            with self.subTest(reason=reason):
                path = self.write(f"start-{i}", changed(changes))
                with self.assertRaisesRegex(ValueError, reason):
                    load(path)

    def test_files_that_do_not_fit(self):
        for i, (reason, changes) in enumerate(UNFIT + WRONG + SHAPES):
            with self.subTest(reason=reason):
                path = self.write(f"update-{i}", changed(changes))
                answer = self.updater.update_weights_from_disk(path, "auto")
                self.assert_refused(answer, f"{reason}.*Nothing was written")
        for path, reason in ("/no/such", "no such folder"), (self.new, "use auto"):
            load_format = "auto" if path != self.new else "dummy"
            answer = self.updater.update_weights_from_disk(path, load_format)
            self.assert_refused(answer, f"{reason}.*Nothing was written")

    def test_files_with_nan_are_undone(self):
        for i, (reason, changes) in enumerate(NAN):
            path = self.write(f"nan-{i}", changed(changes))
            answer = self.updater.update_weights_from_disk(path, "auto")
            self.assert_refused(answer, f"{reason}.*\n.*Rolling back")

    def test_tensors_that_do_not_fit(self):
        for reason, changes in WRONG + SHAPES + NAN:
            with self.subTest(reason=reason):
                for sent in changed(changes), {K_SCALE: NEW[K_SCALE], **changes}:
                    answer = self.send(sent)
                    self.assert_refused(answer, f"{reason}.*Nothing was written")
        self.assert_refused(self.send({}), "has no tensors")
        unknown = {"x.weight": NEW[DOWN]}
        self.assert_refused(self.send(unknown), "nothing of 1 tensors: x.weight")

    def test_what_fits_is_written(self):
        expected = held(load(self.new))
        answer = self.updater.update_weights_from_disk(self.new, "auto")
        self.assertEqual(answer, (True, "Succeeded to update model weights."))
        self.assert_serves(expected)
        renamed = {n.replace("scale_inv", "scale"): t for n, t in OLD.items()}
        unknown = {"x.weight": NEW[DOWN]}
        success, message = self.send({**renamed, **unknown})
        self.assertTrue(success, message)
        self.assertRegex(message, "Not taken: x.weight")
        self.assert_serves(self.before)
        for named in NEW.items():
            success, message = self.updater.update_weights_from_tensor([named])
            self.assertTrue(success, message)
        self.assert_serves(expected)

    def test_experts_that_one_rank_reads_again(self):
        """Elastic EP asks no other rank."""
        with mock.patch.object(torch.distributed, "all_gather_object") as gather:
            for name_filter in lambda _: False, lambda name: name == DOWN, None:
                success, message = self.updater.update_weights_from_disk(
                    self.new, "auto", weight_name_filter=name_filter
                )
                self.assertTrue(success, message)
        gather.assert_not_called()

    def test_what_is_left_alone(self):
        """Another quantization, and a model whose code does not run on meta tensors."""
        from sglang.srt.layers.quantization.mxfp8.agreement import CannotCheck
        from sglang.srt.layers.quantization.mxfp8.update_check import UpdateCheck

        model, config = load(self.old), ModelConfig(self.old)
        loader, error = get_model_loader(LoadConfig(), config), CannotCheck("item()")
        del model.mxfp8_update_check
        for quantization in "modelopt_mixed", "mxfp8":
            config.quantization = quantization
            with mock.patch.object(UpdateCheck, "_load", side_effect=error) as asked:
                loader._get_all_weights(config, model)
            self.assertFalse(hasattr(model, "mxfp8_update_check"))
            self.assertEqual(asked.called, quantization == "mxfp8")

    def test_one_of_two_ranks(self):
        command = [sys.executable, __file__, "rank", f"{self.directory}/ranks"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        self.assertEqual([rank.wait() for rank in ranks], [0, 0])


def run_rank(folder: str, rank: int) -> None:
    """What one rank refuses, or fails to do, none writes."""
    torch.set_num_threads(1)
    os.environ["SGLANG_NCCL_SO_PATH"] = "none"  # a CPU host has none
    parallel_state.set_custom_all_reduce(False)
    path = write(f"{folder}-{rank}", OLD)
    parallel_state.init_distributed_environment(
        world_size=2,
        rank=rank,
        local_rank=rank,
        backend="gloo",
        distributed_init_method=f"file://{folder}.store",
    )
    publish_build_topology(world_rank=rank, tp_size=2, ep_size=1, pp_size=1)
    parallel_state.initialize_model_parallel(backend="gloo")
    with without_a_server():
        model = load(path)
        updater, before = updater_of(model, path), held(model)
        fine, cut = list(NEW.items()), list(changed(SHAPES[0][1]).items())
        bad = write(f"{folder}-bad-{rank}", changed({K_SCALE: None}) if rank else NEW)
        for update, reason in (
            (
                lambda: updater.load_weights_from_distributed(cut if rank else fine),
                "was",
            ),
            (
                lambda: updater.update_weights_from_tensor([] if rank else fine),
                "no ten",
            ),
            (lambda: updater.update_weights_from_disk(bad, "auto"), "lacks the scale"),
        ):
            success, message = update()
            assert not success, reason
            assert re.search(f"{reason}.*Nothing was written", message), message
            for name, data in held(model).items():
                assert torch.equal(data, before[name]), name
        success, message = updater.load_weights_from_distributed(fine)
        assert success, message
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(sys.argv[2], int(sys.argv[3]))
    else:
        unittest.main()
