"""Every way to update the weights of a running MXFP8 server, over real HTTP, on a CPU.

FlashInfer's kernels are emulated; the weights are in the kernels' layouts. At start a
server answers as transformers does. After each update the log probabilities must equal
those of a server started on the new weights, bit for bit. What holds for sglang 0.5.9 alone
says so: a later one writes past the loaders unchecked, takes no bytes for e4m3, and reads
weights and answers as they are.
"""

import concurrent.futures
import functools
import os
import tempfile
import unittest

import requests
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sglang.srt.utils import init_custom_process_group
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from sglang.test import mxfp8_utils
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TINY_LLAMA,
    CpuServer,
    as_reference,
    assert_as_close_as_bf16,
    free_port,
    fused_parameters,
    is_release,
    only_on,
    tiny_llama_tensors,
    with_e8m0_scales,
    with_weight_scale,
    without,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=80, suite="default")

PROMPT = list(range(3, 60))
WEIGHT = "model.layers.0.mlp.down_proj.weight"
RAW_LOADER, BREAKER = (
    f"{mxfp8_utils.__name__}.{loader.__name__}"
    for loader in (mxfp8_utils.write_past_the_loaders, mxfp8_utils.break_the_next_move)
)


def flattened(tensors: dict) -> dict:
    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    return {
        "flattened_tensor": bucket.get_flattened_tensor(),
        "metadata": bucket.get_metadata(),
    }


class TestMXFP8WeightUpdates(CustomTestCase):
    """Server a, which is updated, and server b, which says what it should then answer."""

    @classmethod
    def setUpClass(cls):
        cls.directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.tensors = {n: tiny_llama_tensors(seed) for seed, n in enumerate("ab")}
        cls.paths, cls.expected, servers = {}, {}, []
        loaders = "--custom-weight-loader", RAW_LOADER, BREAKER
        # An idle server's /health is then green for as long as it is there.
        env = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
        for name, tensors in cls.tensors.items():
            cls.paths[name] = cls.write(name, tensors)
            args = cls.paths[name], "--skip-tokenizer-init", *loaders
            servers.append(cls.enterClassContext(CpuServer(*args, env=env)))
            cls.expected[name] = servers[-1].logprobs(PROMPT)
        cls.server, cls.other = servers
        assert not torch.equal(cls.expected["a"], cls.expected["b"])

    @classmethod
    def write(cls, name: str, tensors: dict) -> str:
        return write_checkpoint(os.path.join(cls.directory, name), tensors)

    def tearDown(self):
        self.assert_succeeds(self.server.update_from_disk(self.paths["a"]))
        self.assert_serves("a")

    def assert_serves(self, name: str):
        served = self.server.logprobs(PROMPT)
        self.assertTrue(torch.equal(served, self.expected[name]), f"not {name}")

    def assert_succeeds(self, result: dict) -> None:
        self.assertTrue(result["success"], result["message"])

    def assert_updates(self, update, *as_sent) -> None:
        """To b and to b again, then back to a."""
        for name in "bba":
            tensors = self.tensors[name]
            for change in as_sent:
                tensors = change(tensors)
            self.assert_succeeds(update(tensors))
            self.assert_serves(name)

    def test_at_start_it_answers_as_transformers_does(self):
        """Of a long prompt all scales are 128x4; of a short one those of narrow layers
        are 8x4."""
        if is_release("0.5.9"):  # the log of another is another
            self.assertRegex(
                self.server.log.getvalue(),
                r"4 on flashinfer_trtllm, 8x4 scales up to M = 128 \(qkv_proj .640, 512., o_"
                r".*; 2 on flashinfer_trtllm, 128x4 scales \(gate_up_proj .1088, 512.\); "
                r"2 on flashinfer_cutlass \(down_proj .512, 544.\) since K = 544",
            )
        model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
        reference = as_reference(model, self.tensors["a"])
        for m in (300, 40):
            prompt = [(7 * i) % 300 + 3 for i in range(m)]
            served = self.server.logprobs(prompt)
            assert_as_close_as_bf16(served, reference, prompt, times=1.2)

    def test_disk(self):
        for name in "abba":
            self.assert_succeeds(self.server.update_from_disk(self.paths[name]))
            self.assert_serves(name)

    def test_tensor(self):
        ways = [
            (None, with_e8m0_scales, dict.items, list),
            (None, with_weight_scale, dict.items, list),
            ("flattened_bucket", flattened),
        ]
        if is_release("0.5.9"):
            ways += [
                ("direct", fused_parameters, with_weight_scale, dict.items, list),
                (RAW_LOADER, fused_parameters, dict.items, list),
            ]
        for load_format, *as_sent in ways:
            update = functools.partial(
                self.server.update_from_tensor, load_format=load_format
            )
            with self.subTest(load_format, as_sent=as_sent):
                self.assert_updates(update, *as_sent)

    def test_buckets_in_any_order_with_scales_apart(self):
        items = sorted(self.tensors["b"].items(), key=lambda item: item[0][::-1])
        for start in range(0, len(items), 7):
            sent = items[start : start + 7]
            self.assert_succeeds(self.server.update_from_tensor(sent))
        self.assert_serves("b")

    @only_on("0.5.9")
    def test_distributed(self):
        port = free_port()
        group = dict(world_size=2, group_name="trainer", backend="gloo")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            joined = pool.submit(
                self.server.post,
                "/init_weights_update_group",
                master_address="127.0.0.1",
                master_port=port,
                rank_offset=1,
                **group,
            )
            trainer = init_custom_process_group(
                init_method=f"tcp://127.0.0.1:{port}", rank=0, **group
            )
            self.assertTrue(joined.result()["success"])

            def update(tensors):
                # gloo carries no fp8: it is sent as bytes.
                sent = {
                    name: t.view(torch.uint8) if t.itemsize == 1 else t
                    for name, t in tensors.items()
                }
                received = pool.submit(
                    self.server.post,
                    "/update_weights_from_distributed",
                    names=list(sent),
                    dtypes=[str(t.dtype).removeprefix("torch.") for t in sent.values()],
                    shapes=[list(t.shape) for t in sent.values()],
                    group_name="trainer",
                )
                for tensor in sent.values():
                    torch.distributed.broadcast(tensor, src=0, group=trainer)
                return received.result()

            self.assert_updates(update)
            refused = update({WEIGHT: self.tensors["b"][WEIGHT].float()})
        self.assert_refused(refused, "Nothing was written")

    @only_on("0.5.9")
    def test_it_answers_while_it_is_updated(self):
        def update():
            for name in "baba":
                self.assert_succeeds(self.server.update_from_disk(self.paths[name]))
                sent = list(self.tensors[name].items())
                self.assert_succeeds(self.server.update_from_tensor(sent))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            updates, answers = pool.submit(update), 0
            while not updates.done():
                served, answers = self.server.logprobs(PROMPT), answers + 1
                is_one = [torch.equal(served, e) for e in self.expected.values()]
                self.assertTrue(any(is_one), "from weights that are neither a nor b")
            updates.result()
        self.assertGreater(answers, 0)

    @only_on("0.5.9")
    def test_get_weights_by_name_gives_checkpoint_bytes(self):
        served = self.server.post("/get_weights_by_name", name=WEIGHT, truncate_size=8)
        self.assertEqual(served, self.tensors["a"][WEIGHT][:8].float().tolist())

    def assert_refused(self, result: dict, message: str) -> None:
        self.assertFalse(result["success"])
        self.assertRegex(result["message"], message)
        self.assert_serves("a")

    def test_what_is_refused_changes_nothing(self):
        """test_mxfp8_update_check.py has all that is refused."""
        good, update = self.tensors["b"], self.server.update_from_tensor
        bad = {WEIGHT: good[WEIGHT].bfloat16()}
        message = f"{WEIGHT}.* torch.bfloat16.*Nothing was written"
        self.assert_refused(update(list({**good, **bad}.items())), message)
        if is_release("0.5.9"):
            fused = {**fused_parameters(good), **bad}
            self.assert_refused(update(list(fused.items()), "direct"), message)
        path = self.write("bad", without(good, f"{WEIGHT}_scale"))
        self.assert_refused(self.server.update_from_disk(path), "lacks the scale")

    @only_on("0.5.9")
    def test_with_a_half_moved_layer_it_says_so_and_ends(self):
        """Though nobody asks it anything."""
        answer = self.other.update_from_tensor([], BREAKER)
        reason = "half rearranged by MemoryError.'no room'.*restart it"
        self.assertFalse(answer["success"])
        self.assertRegex(answer["message"], f"qkv_proj .*{reason}.*Nothing mends")
        self.other.process.wait(60)
        with self.assertRaises(requests.ConnectionError):
            requests.get(f"{self.other.url}/health")
        log = self.other.log.getvalue()
        self.assertRegex(log, f"Scheduler hit an exception[^$]*{reason}")


if __name__ == "__main__":
    unittest.main()
