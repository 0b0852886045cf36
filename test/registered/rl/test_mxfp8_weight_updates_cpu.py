"""Every way to update the weights of a running MXFP8 server, over real HTTP, on a CPU.

FlashInfer's kernels are emulated; the weights are in the kernels' layouts. After each
update the log probabilities must equal those of a server started on the new weights,
bit for bit.
"""

import concurrent.futures
import os
import socket
import tempfile
import threading
import unittest
from unittest import mock

import requests
import torch

from sglang.srt.layers.quantization.mxfp8 import weights
from sglang.srt.utils import (
    MultiprocessingSerializer,
    init_custom_process_group,
    kill_process_tree,
)
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fused_parameters,
    launch_cpu_server,
    prompt_logprobs,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=200, suite="default")

PROMPT = list(range(3, 60))
RAW_LOADER = "sglang.test.mxfp8_utils.write_past_the_loaders"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def with_weight_scale(tensors: dict) -> dict:
    """Scales by the name that ModelOpt and compressed-tensors give them."""
    return {
        n.replace("weight_scale_inv", "weight_scale"): t for n, t in tensors.items()
    }


def flattened(tensors: dict) -> dict:
    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    return {
        "flattened_tensor": bucket.get_flattened_tensor(),
        "metadata": bucket.get_metadata(),
    }


class TestMXFP8WeightUpdates(CustomTestCase):
    base_url = "http://127.0.0.1:31875"

    @classmethod
    def setUpClass(cls):
        # Without a CUDA device tensors travel by file.
        torch.multiprocessing.set_sharing_strategy("file_system")
        cls.directory = tempfile.TemporaryDirectory()
        cls.tensors = {name: tiny_llama_tensors(seed) for seed, name in enumerate("ab")}
        cls.paths = {
            name: write_checkpoint(os.path.join(cls.directory.name, name), tensors)
            for name, tensors in cls.tensors.items()
        }
        cls.expected = {}
        for name in "ba":
            cls.process = cls.launch(cls.paths[name])
            cls.expected[name] = prompt_logprobs(cls.base_url, PROMPT)
            if name == "b":
                kill_process_tree(cls.process.pid)
        assert not torch.equal(cls.expected["a"], cls.expected["b"])

    @classmethod
    def launch(cls, path: str):
        return launch_cpu_server(
            path,
            cls.base_url,
            "flashinfer_trtllm",
            ["--skip-tokenizer-init", "--custom-weight-loader", RAW_LOADER],
        )

    @classmethod
    def tearDownClass(cls):
        kill_process_tree(cls.process.pid)
        cls.directory.cleanup()

    def tearDown(self):
        self.assertTrue(self.update_from_disk("a")["success"])
        self.assert_serves("a")

    def assert_serves(self, name: str):
        served = prompt_logprobs(self.base_url, PROMPT)
        self.assertTrue(torch.equal(served, self.expected[name]), f"not {name}")

    def post(self, path: str, **body) -> dict:
        response = requests.post(f"{self.base_url}{path}", json=body, timeout=120)
        return response.json()

    def update_from_disk(self, name: str) -> dict:
        path = self.paths.get(name, name)
        return self.post("/update_weights_from_disk", model_path=path)

    def update_from_tensor(self, tensors, load_format=None) -> dict:
        payload = (
            list(tensors.items()) if load_format != "flattened_bucket" else tensors
        )
        return self.post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[
                MultiprocessingSerializer.serialize(payload, output_str=True)
            ],
            load_format=load_format,
            flush_cache=True,
        )

    def assert_updates(self, update, tensors) -> None:
        """To b and to b again, then back to a."""
        for name in "bba":
            result = update(tensors(self.tensors[name]))
            self.assertTrue(result["success"], result["message"])
            self.assert_serves(name)

    def test_disk(self):
        for name in "abba":
            self.assertTrue(self.update_from_disk(name)["success"])
            self.assert_serves(name)

    def test_tensor(self):
        self.assert_updates(self.update_from_tensor, dict)

    def test_tensor_with_scales_as_e8m0(self):
        self.assert_updates(
            self.update_from_tensor,
            lambda tensors: {
                n: t.view(torch.float8_e8m0fnu) if n.endswith("_scale_inv") else t
                for n, t in tensors.items()
            },
        )

    def test_flattened_bucket(self):
        self.assert_updates(
            lambda bucket: self.update_from_tensor(bucket, "flattened_bucket"),
            flattened,
        )

    def test_direct(self):
        self.assert_updates(
            lambda fused: self.update_from_tensor(fused, "direct"), fused_parameters
        )

    def test_scales_by_their_other_name(self):
        self.assert_updates(self.update_from_tensor, with_weight_scale)
        self.assert_updates(
            lambda bucket: self.update_from_tensor(bucket, "flattened_bucket"),
            lambda tensors: flattened(with_weight_scale(tensors)),
        )
        self.assert_updates(
            lambda fused: self.update_from_tensor(fused, "direct"),
            lambda tensors: with_weight_scale(fused_parameters(tensors)),
        )
        path = os.path.join(self.directory.name, "modelopt")
        write_checkpoint(path, with_weight_scale(self.tensors["b"]))
        self.assertTrue(self.update_from_disk(path)["success"])
        self.assert_serves("b")

    def test_custom_loader_that_writes_raw_bytes(self):
        self.assert_updates(
            lambda fused: self.update_from_tensor(fused, RAW_LOADER), fused_parameters
        )

    def test_buckets_in_any_order_with_scales_apart(self):
        items = sorted(self.tensors["b"].items(), key=lambda item: item[0][::-1])
        for start in range(0, len(items), 7):
            result = self.update_from_tensor(dict(items[start : start + 7]))
            self.assertTrue(result["success"], result["message"])
        self.assert_serves("b")

    def test_a_part_of_a_fused_layer(self):
        part = "model.layers.1.self_attn.k_proj"
        mixed = {
            n: self.tensors["b" if n.startswith(part) else "a"][n]
            for n in self.tensors["a"]
        }
        path = write_checkpoint(os.path.join(self.directory.name, "mixed"), mixed)
        self.assertTrue(self.update_from_disk(path)["success"])
        expected = prompt_logprobs(self.base_url, PROMPT)
        self.assertFalse(torch.equal(expected, self.expected["a"]))
        self.assertTrue(self.update_from_disk("a")["success"])
        sent = {n: t for n, t in mixed.items() if n.startswith(part)}
        self.assertTrue(self.update_from_tensor(sent)["success"])
        self.assertTrue(torch.equal(prompt_logprobs(self.base_url, PROMPT), expected))

    def test_distributed(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        group = dict(world_size=2, group_name="trainer", backend="gloo")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            joined = pool.submit(
                self.post,
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
                sent = {name: as_bytes(tensor) for name, tensor in tensors.items()}
                received = pool.submit(
                    self.post,
                    "/update_weights_from_distributed",
                    names=list(sent),
                    dtypes=[str(t.dtype).removeprefix("torch.") for t in sent.values()],
                    shapes=[list(t.shape) for t in sent.values()],
                    group_name="trainer",
                )
                for tensor in sent.values():
                    torch.distributed.broadcast(tensor, src=0, group=trainer)
                return received.result()

            self.assert_updates(update, dict)
            self.assert_updates(update, with_weight_scale)
            name = "model.layers.0.mlp.down_proj.weight"
            refused = update({name: self.tensors["b"][name].float()})
            self.assertFalse(refused["success"])
            self.assertIn("Nothing was written", refused["message"])
        self.assert_serves("a")

    def test_it_answers_while_it_is_updated(self):
        stop, answers = threading.Event(), []

        def ask():
            while not stop.is_set() and len(answers) < 1000:
                answers.append(prompt_logprobs(self.base_url, PROMPT))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            for name in "baba":
                self.assertTrue(self.update_from_disk(name)["success"])
                self.assertTrue(self.update_from_tensor(self.tensors[name])["success"])
        finally:
            stop.set()
            thread.join()
        self.assertGreater(len(answers), 0)
        for answer in answers:
            self.assertTrue(
                any(torch.equal(answer, e) for e in self.expected.values()),
                "an answer from weights that are neither a nor b",
            )

    def test_get_weights_by_name_gives_checkpoint_bytes(self):
        name = "model.layers.1.mlp.down_proj.weight"
        served = self.post("/get_weights_by_name", name=name, truncate_size=8)
        self.assertEqual(served, self.tensors["a"][name][:8].float().tolist())

    def assert_refused(self, result: dict, message: str) -> None:
        self.assertFalse(result["success"])
        self.assertRegex(result["message"], message)
        self.assert_serves("a")

    def test_bad_tensors_change_nothing(self):
        good = self.tensors["b"]
        weight = "model.layers.1.mlp.up_proj.weight"
        bad = {
            "holds torch.float8_e4m3fn, got torch.bfloat16": good[weight].bfloat16(),
            r"is \[544, 512\], got \[512, 512\]": good[weight][:512].contiguous(),
            r"is \[544, 512\], got \[544, 256\]": good[weight][:, :256].contiguous(),
        }
        for message, tensor in bad.items():
            with self.subTest(message):
                result = self.update_from_tensor({**good, weight: tensor})
                self.assert_refused(result, message)
        norm = {**good, "model.norm.weight": torch.ones(7).bfloat16()}
        self.assert_refused(self.update_from_tensor(norm), r"\[7\].*\[512\]")
        scale = f"{weight}_scale_inv"
        renamed = {weight: good[weight], f"{weight}_scale_2": good[scale]}
        self.assert_refused(
            self.update_from_tensor(renamed), "is called weight_scale_inv"
        )
        in_bf16 = {"model.norm.weight": good[weight][0].contiguous()}
        self.assert_refused(self.update_from_tensor(in_bf16), "is not quantized here")
        unknown = {"model.no_such.weight": good[weight]}
        self.assert_refused(self.update_from_tensor(unknown), "takes nothing of 1 ")
        norm = {"model.norm.weight": good["model.norm.weight"]}
        result = self.update_from_tensor({**norm, **unknown})
        self.assertRegex(result["message"], "Not taken: model.no_such.weight")
        self.assertTrue(result["success"])
        self.assert_serves("a")
        fused = fused_parameters(good)
        for message, change in {
            "has no parameter nothing": {"nothing": good[weight]},
            "got torch.bfloat16": {
                n: t.bfloat16()
                for n, t in fused.items()
                if n.endswith("down_proj.weight")
            },
            r"is \[512\], got \[7\]": {"model.norm.weight": torch.ones(7).bfloat16()},
        }.items():
            with self.subTest(direct=message):
                result = self.update_from_tensor({**fused, **change}, "direct")
                self.assert_refused(result, message)

    def test_a_bad_checkpoint_changes_nothing(self):
        weight = "model.layers.0.mlp.gate_proj.weight"
        scale = "model.layers.0.mlp.gate_proj.weight_scale_inv"
        good = self.tensors["b"]
        cases = {
            "lacks the scale of .*gate_proj.weight": {
                n: t for n, t in good.items() if n != scale
            },
            "got torch.bfloat16": {**good, weight: good[weight].bfloat16()},
            r"is \[544, 512\], got \[512, 512\]": {
                **good,
                weight: good[weight][:512].contiguous(),
            },
            "takes nothing of .* tensors": {
                f"another.{name}": tensor for name, tensor in good.items()
            },
        }
        for i, (message, tensors) in enumerate(cases.items()):
            with self.subTest(message):
                path = os.path.join(self.directory.name, f"bad{i}")
                result = self.update_from_disk(write_checkpoint(path, tensors))
                self.assert_refused(result, f"{message}.*Nothing was written")

    def test_a_damaged_checkpoint_changes_nothing(self):
        path = os.path.join(self.directory.name, "truncated")
        file = os.path.join(
            write_checkpoint(path, self.tensors["b"]), "model.safetensors"
        )
        os.truncate(file, os.path.getsize(file) // 2)
        self.assert_refused(self.update_from_disk(path), "cannot be read")
        with open(
            os.path.join(self.paths["b"], "model.safetensors.index.json"), "w"
        ) as f:
            f.write('{"weight_map": {"model.gone.weight": "model.safetensors"}}')
        try:
            self.assert_refused(self.update_from_disk("b"), "model.gone.weight")
        finally:
            os.remove(f.name)
        self.assert_refused(self.update_from_disk("/no/such/checkpoint"), "no/such")


def break_the_next_move(model: torch.nn.Module, named_tensors) -> None:
    """A --custom-weight-loader after which no trtllm weight can be rearranged."""
    weights.shuffle_rows_ = mock.Mock(side_effect=MemoryError("no room"))


class TestAHalfMovedLayer(CustomTestCase):
    def test_the_server_says_so_and_answers_nothing_any_more(self):
        url, breaker = TestMXFP8WeightUpdates.base_url, break_the_next_move.__name__
        breaker = f"{os.path.basename(__file__).removesuffix('.py')}.{breaker}"
        search = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
        with tempfile.TemporaryDirectory() as directory:
            log = self.enterContext(open(os.path.join(directory, "log"), "w+"))
            server = launch_cpu_server(
                write_checkpoint(directory, tiny_llama_tensors()),
                url,
                "flashinfer_trtllm",
                ["--skip-tokenizer-init", "--custom-weight-loader", breaker],
                env={"PYTHONPATH": os.pathsep.join(search)},
                log=log,
            )
            self.addCleanup(kill_process_tree, server.pid)
            update = dict(
                serialized_named_tensors=[
                    MultiprocessingSerializer.serialize([], output_str=True)
                ],
                load_format=breaker,
            )
            answer = requests.post(
                f"{url}/update_weights_from_tensor", json=update, timeout=60
            ).json()
            reason = "half rearranged by MemoryError.'no room'.*restart it"
            self.assertFalse(answer["success"])
            self.assertRegex(answer["message"], f"qkv_proj .*{reason}.*Nothing mends")
            with self.assertRaises(requests.ConnectionError):
                requests.get(f"{url}/health", timeout=60)
            server.wait(60)
            log.seek(0)
            self.assertRegex(log.read(), f"Scheduler hit an exception[^$]*{reason}")


if __name__ == "__main__":
    unittest.main()
