"""What an MXFP8 model would not take is refused before it is written, from files and from
memory, on all ranks. A CPU serves it by weight_only; no kernel runs."""

import re
import unittest
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import get_model_loader
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_checkpoints import (
    LAYERS,
    MXFP8,
    load_checkpoint,
    random_tensors,
    write_checkpoint,
)
from sglang.test.mxfp8_updates import updater_of
from sglang.test.test_utils import CustomTestCase
from sglang.test.two_ranks import run_on_two_ranks

register_cpu_ci(est_time=30, suite="base-a-test-cpu")

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
K_PROJ = f"{LAYERS[1]}.self_attn.k_proj.weight"
K_SCALE = f"{K_PROJ}_scale_inv"
DOWN = f"{LAYERS[0]}.mlp.down_proj.weight"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


OLD, NEW = random_tensors(1), random_tensors(2)


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


def held(model: torch.nn.Module) -> dict:
    """The bytes that are served."""
    params = model.named_parameters()
    return {n: p.data.contiguous().view(torch.uint8).clone() for n, p in params}


class TestMxfp8UpdateCheck(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = cls.enterClassContext(TemporaryDirectory())
        cls.old, cls.new = cls.write(OLD), cls.write(NEW)

    @classmethod
    def write(cls, tensors: dict) -> str:
        return write_checkpoint(cls.directory, tensors, MXFP8)

    def setUp(self):
        self.model = load_checkpoint(self.old)
        self.before = held(self.model)
        config = ModelConfig(self.old)
        self.updater = self.enterContext(updater_of(self.model, config))

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
        for reason, changes in UNFIT + WRONG + NAN:
            with self.subTest(reason=reason):
                path = self.write(changed(changes))
                with self.assertRaisesRegex(ValueError, reason):
                    load_checkpoint(path)

    def test_files_that_do_not_fit(self):
        for reason, changes in UNFIT + WRONG + SHAPES:
            with self.subTest(reason=reason):
                path = self.write(changed(changes))
                answer = self.updater.update_weights_from_disk(path, "auto")
                self.assert_refused(answer, f"{reason}.*Nothing was written")
        for path, reason in ("/no/such", "no such folder"), (self.new, "use auto"):
            load_format = "auto" if path != self.new else "dummy"
            answer = self.updater.update_weights_from_disk(path, load_format)
            self.assert_refused(answer, f"{reason}.*Nothing was written")

    def test_files_with_nan_are_undone(self):
        for reason, changes in NAN:
            path = self.write(changed(changes))
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
        expected = held(load_checkpoint(self.new))
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

        model, config = load_checkpoint(self.old), ModelConfig(self.old)
        loader, error = get_model_loader(LoadConfig(), config), CannotCheck("item()")
        del model.mxfp8_update_check
        for quantization in "modelopt_mixed", "mxfp8":
            config.quantization = quantization
            with mock.patch.object(UpdateCheck, "_load", side_effect=error) as asked:
                loader._get_all_weights(config, model)
            self.assertFalse(hasattr(model, "mxfp8_update_check"))
            self.assertEqual(asked.called, quantization == "mxfp8")

    def test_one_of_two_ranks(self):
        with TemporaryDirectory() as folder:
            run_on_two_ranks(run_rank, folder)


def run_rank(rank: int, folder: str) -> None:
    """What one rank refuses, or fails to do, none writes."""
    path = write_checkpoint(folder, OLD, MXFP8)
    model = load_checkpoint(path)
    before, fine = held(model), list(NEW.items())
    cut = list(changed(SHAPES[0][1]).items())
    bad = write_checkpoint(folder, changed({K_SCALE: None}) if rank else NEW, MXFP8)
    with updater_of(model, ModelConfig(path)) as updater:
        for reason, update, *arguments in (
            ("was", updater.load_weights_from_distributed, cut if rank else fine),
            ("no ten", updater.update_weights_from_tensor, [] if rank else fine),
            ("lacks the scale", updater.update_weights_from_disk, bad, "auto"),
        ):
            success, message = update(*arguments)
            assert not success, reason
            assert re.search(f"{reason}.*Nothing was written", message), message
            for name, data in held(model).items():
                assert torch.equal(data, before[name]), name
        success, message = updater.load_weights_from_distributed(fine)
        assert success, message


if __name__ == "__main__":
    unittest.main()
