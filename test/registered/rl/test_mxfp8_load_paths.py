"""Every way to fill an MXFP8 model but the updates of a running server, on a CPU.

Real upstream loaders load a tiny Llama in this process; FlashInfer's kernels are emulated.
Stand-ins, where the real thing needs hardware or a service: a dict for redis, a list for
NCCL, a `checkpoint_engine` module that calls what it was given, offloaders that find
nothing to move on a CPU.
"""

import contextlib
import itertools
import json
import os
import sys
import types
import unittest
from unittest import mock

import torch
from transformers import LlamaConfig

from sglang.srt.connector import BaseKVConnector, RemoteInstanceConnector
from sglang.srt.layers.quantization.mxfp8.lifecycle import mxfp8_checkpoint_form
from sglang.srt.layers.quantization.mxfp8.weights import (
    check_parameters,
    mxfp8_weights_of,
)
from sglang.srt.model_loader import loader as loaders
from sglang.srt.models.deepseek import DeepseekForCausalLM
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.utils.offloader import NoopOffloader, OffloaderV1, set_offloader
from sglang.srt.utils.weight_checker import WeightChecker
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TinyModelTestCase,
    load_on_cpu,
    model_runner,
    mxfp8_config,
    tiny_llama_tensors,
)

register_cpu_ci(est_time=30, suite="default")

DOWN = "model.layers.1.mlp.down_proj.weight"


class TestLoadFormats(TinyModelTestCase):
    def write_pickle(self, tensors: dict) -> str:
        path = self.write({})
        torch.save(tensors, os.path.join(path, "model.pt"))
        return path

    def test_what_is_loaded_is_served_and_updated(self):
        sharded = self.write({})
        model_runner(load_on_cpu(self.path_a)).save_sharded_model(sharded)
        for path, load_format in (
            (self.write_pickle(self.a), "pt"),
            (sharded, "sharded_state"),
            (self.path_a, "dummy"),
        ):
            with self.subTest(load_format):
                model = load_on_cpu(path, load_format=load_format)
                if load_format != "dummy":
                    self.assert_serves(model, self.a)
                for weights in mxfp8_weights_of(model):
                    x = torch.ones(2, weights.layer.input_size).bfloat16()
                    self.assertTrue(weights.layer(x)[0].isfinite().all())
                self.assert_updates(model)

    def test_what_cannot_fill_a_model_is_refused(self):
        def load_weights_to_module(*_):
            """Upstream gives it to models of torch's own linears only."""

        as_torchs = mock.patch.multiple(
            LlamaForCausalLM, create=True, load_weights_to_module=load_weights_to_module
        )
        engine = dict(remote_instance_weight_loader_transfer_engine=mock.Mock())
        receives = dict(
            load_format="remote_instance",
            remote_instance_weight_loader_backend="transfer_engine",
            **engine,
        )
        by_engine = mock.patch.multiple(
            loaders.RemoteInstanceModelLoader,
            load_model_from_remote_instance_by_transfer_engine=mock.Mock(),
        )
        self.enterContext(mock.patch.object(loaders, "register_memory_region"))
        for reason, patch, load_config in (
            ("--load-format auto", as_torchs, dict(load_format="layered")),
            ("flash_rl.*--quantization mxfp8", None, dict(load_format="flash_rl")),
            ("loader-backend nccl", None, engine),  # the server that sends
            ("loader-backend nccl", by_engine, receives),
        ):
            reason = f"layers.0.self_attn.qkv_proj .flashinfer_trtllm.*{reason}"
            with self.subTest(reason), patch or contextlib.nullcontext():
                with self.assertRaisesRegex(RuntimeError, reason):
                    load_on_cpu(self.path_a, **load_config)

    def test_formats_of_an_update_from_disk(self):
        model = load_on_cpu(self.path_a)
        for load_format in ("flash_rl", "dummy", "sharded_state", "remote"):
            refusal = self.refusal_of(model, self.path_b, load_format)
            self.assertRegex(refusal, f"{load_format}.*Nothing was written")
        path = self.write_pickle({**self.b, "epoch": 3})
        index = {"weight_map": {DOWN: "model-00001-of-00002.safetensors"}}
        with open(os.path.join(path, "model.safetensors.index.json"), "w") as file:
            json.dump(index, file)  # of files that were not fetched
        self.assertEqual(self.refusal_of(model, path, "pt"), "")
        path = self.write_pickle({**self.b, DOWN: self.b[DOWN].bfloat16()})
        self.assertRegex(self.refusal_of(model, path, "pt"), "got torch.bfloat16")
        file = os.path.join(path, "model.pt")
        os.truncate(file, os.path.getsize(file) // 2)
        refusal = self.refusal_of(model, path, "pt")
        self.assertRegex(refusal, "cannot be read.*Nothing was written")
        self.assert_serves(model, self.a)


class TestLostBytes(TinyModelTestCase):
    """An update restores what has other bytes than it was left with."""

    def test_the_memory_saver_and_the_weights_checker(self):
        """The saver's pause and resume need CUDA; what they do to memory is done here."""
        model = load_on_cpu(self.path_a)
        for weights in mxfp8_weights_of(model):
            for param in (weights.layer.weight, weights.layer.weight_scale_inv):
                storage = param.untyped_storage()  # with the padding
                torch.empty(0, dtype=torch.uint8).set_(storage).random_()
        self.assert_updates(model)
        runner = model_runner(model)
        runner._weight_checker = WeightChecker(runner)
        with torch.no_grad():
            runner.check_weights("snapshot")
            self.assert_serves(model, self.a)
            runner.check_weights("reset_tensors")
        with mxfp8_checkpoint_form(model):
            scale = mxfp8_weights_of(model)[0].layer.weight_scale_inv
            self.assertGreater(scale.unique().numel(), 200)
        self.assert_updates(model)


class TestRemote(TinyModelTestCase):
    def connector(self, kind: type) -> mock.MagicMock:
        """What the loaders get for any address."""
        connector = mock.MagicMock(spec=kind)
        connector.__enter__.return_value = connector
        connect = mock.Mock(return_value=connector)
        self.enterContext(
            mock.patch.object(loaders, "create_remote_connector", connect)
        )
        return connector

    def test_a_model_is_saved_and_loaded(self):
        store, connector = {}, self.connector(BaseKVConnector)
        connector.set = lambda key, tensor: store.update({key: tensor.clone()})
        connector.weight_iterator = lambda rank: (
            (key.rpartition("/")[2], tensor) for key, tensor in store.items()
        )
        model = load_on_cpu(self.path_a)
        runner = model_runner(model, model_config=mock.Mock(model_path=self.path_a))
        runner.save_remote_model("redis://localhost:6379/tiny")
        self.assert_serves(model, self.a)
        loaded = load_on_cpu(self.path_a, load_format="remote")
        self.assert_serves(loaded, self.a)
        self.assert_updates(loaded)

    def test_a_server_gets_its_weights_from_another(self):
        """Which serves checkpoint b; the server that gets them reads the config of a."""
        self.connector(RemoteInstanceConnector)._model_update_group = None
        sent = []
        for owner, name, stand_in in (
            (torch.cuda, "synchronize", lambda: None),
            (torch.distributed.distributed_c10d, "destroy_process_group", id),
            (loaders, "trigger_transferring_weights_request", mock.Mock()),
        ):
            self.enterContext(mock.patch.object(owner, name, stand_in))

        def broadcast(do):
            change = lambda tensor, src, group: do(tensor.detach())
            return mock.patch.object(torch.distributed, "broadcast", change)

        sender = load_on_cpu(self.path_b)
        runner = model_runner(sender, _weights_send_group={"weights_1_0": "two"})
        with broadcast(lambda tensor: sent.append(tensor.clone())):
            success, message = runner.send_weights_to_remote_instance(
                "127.0.0.1", "1", "weights"
            )
        self.assertTrue(success, message)
        with broadcast(lambda tensor: tensor.copy_(sent.pop(0))):
            receiver = load_on_cpu(
                self.path_a,
                load_format="remote_instance",
                tp_rank=0,
                remote_instance_weight_loader_backend="nccl",
                remote_instance_weight_loader_send_weights_group_ports=[1],
            )
        self.assertEqual(sent, [])
        for model in sender, receiver:
            self.assert_serves(model, self.b)
            self.assert_updates(model)


class TestCheckpointEngine(TinyModelTestCase):
    def test_buckets_over_ipc(self):
        def hand_over(_, handle, device_id, run, post_hook):
            for start in range(0, len(sent), 5):
                run(sent[start : start + 5])
            post_hook()

        worker = types.SimpleNamespace(update_weights_from_ipc=hand_over)
        modules = {"checkpoint_engine": mock.Mock(), "checkpoint_engine.worker": worker}
        # Its command line needs more packages.
        modules["sglang.srt.checkpoint_engine.update"] = mock.Mock()
        self.enterContext(mock.patch.dict(sys.modules, modules))
        properties = mock.Mock(uuid=0)
        for owner, name, value in (
            (torch.cuda, "current_device", 0),
            (torch.cuda, "get_device_properties", properties),
            # The post hook moves parameters to the GPU.
            (loaders, "device_loading_context", contextlib.nullcontext()),
        ):
            self.enterContext(mock.patch.object(owner, name, return_value=value))
        model = load_on_cpu(self.path_a)
        request = types.SimpleNamespace(zmq_handles={"GPU-0": "ipc://stand-in"})
        for tensors in self.b, self.b, self.a:
            sent = list(tensors.items())
            answer = model_runner(model).update_weights_from_ipc(request)
            self.assertTrue(*answer)
            self.assert_serves(model, tensors)
        sent = [(DOWN, self.b[DOWN].bfloat16())]
        success, message = model_runner(model).update_weights_from_ipc(request)
        self.assertFalse(success)
        self.assertIn("holds torch.float8_e4m3fn, got torch.bfloat16", message)
        self.assert_serves(model, self.a)


class TestOffload(TinyModelTestCase):
    def setUp(self):
        set_offloader(OffloaderV1(1 << 30))
        self.addCleanup(set_offloader, NoopOffloader())

    def test_padded_layers_are_refused_at_start_and_others_are_served(self):
        reason = "gate_up_proj .flashinfer_trtllm.*does not fit.*--cpu-offload-gb"
        with self.assertRaisesRegex(RuntimeError, reason):
            load_on_cpu(self.path_a)
        unpadded = dict(intermediate_size=512)
        tensors = tiny_llama_tensors(**unpadded)
        model = load_on_cpu(self.write(tensors, **unpadded))
        self.assert_serves(model, tensors)
        # As V1 does: the parameters live elsewhere, and each forward gets copies.
        for weights in mxfp8_weights_of(model):
            weights.layer.weight.data = weights.layer.weight.data.clone()
        model.load_weights(tensors.items())
        self.assert_serves(model, tensors)
        for weights in mxfp8_weights_of(model):
            layer = weights.layer
            x = torch.randn(3, layer.input_size).bfloat16()
            expected, _ = layer(x)
            copies = {k: v.clone() for k, v in layer.state_dict().items()}
            output, _ = torch.func.functional_call(layer, copies, (x,))
            self.assertTrue(torch.equal(output, expected), weights.name)


class TestPackedExperts(TinyModelTestCase):
    """DeepSeek V1 packs its experts' weights into one buffer, which `fused_moe` reads."""

    expert = "model.layers.1.mlp.experts.2.down_proj.weight"
    sizes = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=128)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
    experts = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)
    experts |= dict(norm_topk_prob=False, first_k_dense_replace=1, moe_layer_freq=1)
    config = LlamaConfig(**sizes, **experts)

    def build(self, device="cpu", **config) -> torch.nn.Module:
        with loaders.set_default_torch_dtype(torch.bfloat16), torch.device(device):
            return DeepseekForCausalLM(self.config, mxfp8_config(**config))

    def test_in_mxfp8_they_are_refused_before_a_byte_is_written(self):
        reason = "experts.down_proj .*its weight was put into other memory"
        for serialized, device in itertools.product((True, False), ("cpu", "meta")):
            dtype = torch.float8_e4m3fn if serialized else torch.bfloat16
            model = self.build(device, serialized=serialized)
            packed = model.model.layers[1].mlp.w2.view(torch.uint8).fill_(7)
            with self.subTest(serialized=serialized, device=device):
                with self.assertRaisesRegex(ValueError, reason):
                    model.load_weights([(self.expert, torch.ones(256, 128).to(dtype))])
                self.assertTrue(device == "meta" or (packed == 7).all())

    def test_in_bf16_they_load_beside_layers_in_mxfp8(self):
        model = self.build(ignored_layers=["experts"])
        check_parameters(model)
        names = {w.layer.prefix.rpartition(".")[2] for w in mxfp8_weights_of(model)}
        self.assertEqual(names, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
        weight = torch.full((256, 128), 3, dtype=torch.bfloat16)
        model.load_weights([(self.expert, weight)])
        self.assertTrue(torch.equal(model.model.layers[1].mlp.w2[2], weight))


if __name__ == "__main__":
    unittest.main()
