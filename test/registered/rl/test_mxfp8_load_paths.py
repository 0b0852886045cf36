"""Every way to fill an MXFP8 model but the updates of a running server, on a CPU.

Real upstream loaders load a tiny Llama in this process; FlashInfer's kernels are emulated.
Stand-ins, where the real thing needs hardware or a service: a dict for redis, a list for
NCCL, a `checkpoint_engine` module that calls what it was given, offloaders that find
nothing to move on a CPU.
"""

import contextlib
import itertools
import os
import signal
import sys
import types
import unittest
from unittest import mock

import torch
from transformers import LlamaConfig

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.connector import create_remote_connector
from sglang.srt.connector.remote_instance import RemoteInstanceConnector
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
    mxfp8_linear,
    tiny_llama_tensors,
)

register_cpu_ci(est_time=30, suite="default")

DOWN = "model.layers.1.mlp.down_proj.weight"


class LoadPathTestCase(TinyModelTestCase):
    def new_folder(self) -> str:
        """One with the config alone."""
        path = self.write({})
        os.remove(os.path.join(path, "model.safetensors"))
        return path

    def write_pickle(self, tensors: dict) -> str:
        path = self.new_folder()
        torch.save(tensors, os.path.join(path, "model.pt"))
        return path


class TestLoadFormats(LoadPathTestCase):
    def test_what_is_loaded_is_served_and_updated(self):
        sharded = self.new_folder()
        model = load_on_cpu(self.path_a)
        model_runner(model).save_sharded_model(sharded, max_size=1 << 20)
        self.assertGreater(len(os.listdir(sharded)), 2)
        for path, load_format in (
            (self.path_a, "auto"),
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
        with self.assertRaisesRegex(ValueError, "load_weights_to_module"):
            load_on_cpu(self.path_a, load_format="layered")


class TestDiskUpdateFormats(LoadPathTestCase):
    def test_formats_that_cannot_update_are_refused(self):
        model = load_on_cpu(self.path_a)
        for load_format in ("flash_rl", "dummy", "sharded_state", "remote"):
            with self.subTest(load_format):
                refusal = self.refusal_of(model, self.path_b, load_format)
                self.assertRegex(refusal, f"{load_format}.*Nothing was written")
                self.assert_serves(model, self.a)
        self.assert_updates(model)

    def test_pt_files_are_checked(self):
        model = load_on_cpu(self.path_a)
        self.assertEqual(
            self.refusal_of(model, self.write_pickle({**self.b, "epoch": 3}), "pt"), ""
        )
        for reason, changes in (
            ("got torch.bfloat16", {DOWN: self.b[DOWN].bfloat16()}),
            (r"is \[512, 544\], got \[511, 544\]", {DOWN: self.b[DOWN][:-1]}),
            (f"lacks the scale of {DOWN}", {f"{DOWN}_scale_inv": None}),
        ):
            path = self.write_pickle({**self.b, **changes})
            self.assertRegex(self.refusal_of(model, path, "pt"), reason)
        file = os.path.join(path, "model.pt")
        os.truncate(file, os.path.getsize(file) // 2)
        refused = self.refusal_of(model, path, "pt")
        self.assertRegex(refused, "cannot be read.*Nothing was written")


class TestLostBytes(LoadPathTestCase):
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


class TestRemoteKeyValue(LoadPathTestCase):
    def test_a_model_is_saved_and_loaded(self):
        store, client = {}, mock.Mock()
        client.get, client.set = store.get, store.__setitem__
        client.scan = lambda cursor, match: (
            0,
            [key.encode() for key in store if key.startswith(match.removesuffix("*"))],
        )
        redis = mock.Mock(Redis=mock.Mock(return_value=client))
        self.enterContext(mock.patch.dict(sys.modules, redis=redis))
        for number in (signal.SIGINT, signal.SIGTERM):  # connectors take them over
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        url = "redis://localhost:6379/tiny"
        model = load_on_cpu(self.path_a)
        runner = model_runner(model, model_config=mock.Mock(model_path=self.path_a))
        # 0.5.9 forgets to pass the device when it saves.
        connect = lambda url, device="cpu": create_remote_connector(url, device)
        with mock.patch.object(loaders, "create_remote_connector", connect):
            runner.save_remote_model(url)
        self.assert_serves(model, self.a)
        # As the server does for a remote URL.
        with mock.patch.object(ModelConfig, "model_weights", url, create=True):
            loaded = load_on_cpu(self.path_a, load_format="remote")
        self.assert_serves(loaded, self.a)
        self.assert_updates(loaded)


class TestRemoteInstance(LoadPathTestCase):
    def test_a_server_gets_its_weights_from_another(self):
        """Which serves checkpoint b; the server that gets them reads the config of a."""
        connector = mock.MagicMock(spec=RemoteInstanceConnector)
        connector.__enter__.return_value = connector
        connector._model_update_group = None
        connect = mock.patch.multiple(
            loaders,
            create_remote_connector=lambda *_: connector,
            trigger_transferring_weights_request=mock.Mock(),
        )
        sent = []
        for owner, name, stand_in in (
            (torch.cuda, "synchronize", lambda: None),
            (torch.distributed.distributed_c10d, "destroy_process_group", id),
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
        with connect, broadcast(lambda tensor: tensor.copy_(sent.pop(0))):
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


class TestCheckpointEngine(LoadPathTestCase):
    def setUp(self):
        """A `checkpoint_engine` that hands over what it was asked for in buckets."""
        worker = types.SimpleNamespace(update_weights_from_ipc=self.hand_over)
        modules = {"checkpoint_engine": mock.Mock(), "checkpoint_engine.worker": worker}
        # Its command line needs more packages.
        modules["sglang.srt.checkpoint_engine.update"] = mock.Mock()
        self.enterContext(mock.patch.dict(sys.modules, modules))
        from sglang.srt.checkpoint_engine import checkpoint_engine_worker

        extension = checkpoint_engine_worker.SGLangCheckpointEngineWorkerExtensionImpl
        for owner, name, value in (
            (extension, "get_device_uuid", "GPU-0"),
            (torch.cuda, "current_device", 0),
            # The post hook moves parameters to the GPU.
            (loaders, "device_loading_context", contextlib.nullcontext()),
        ):
            self.enterContext(mock.patch.object(owner, name, return_value=value))

    def hand_over(self, _, handle, device_id, run, post_hook):
        for start in range(0, len(self.sent), 5):
            run(self.sent[start : start + 5])
        post_hook()

    def test_buckets_over_ipc(self):
        model = load_on_cpu(self.path_a)
        runner = model_runner(model)
        request = types.SimpleNamespace(zmq_handles={"GPU-0": "ipc://stand-in"})
        for tensors in self.b, self.b, self.a:
            self.sent = list(tensors.items())
            success, message = runner.update_weights_from_ipc(request)
            self.assertTrue(success, message)
            self.assert_serves(model, tensors)
        self.sent = [(DOWN, self.b[DOWN].bfloat16())]
        success, message = runner.update_weights_from_ipc(request)
        self.assertFalse(success)
        self.assertIn("holds torch.float8_e4m3fn, got torch.bfloat16", message)
        self.assert_serves(model, self.a)


class TestOffload(LoadPathTestCase):
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
        model.load_weights(tensors.items())
        self.assert_serves(model, tensors)
        # As V1 does: the parameters live elsewhere, and each forward gets copies.
        for weights in mxfp8_weights_of(model):
            layer = weights.layer
            x = torch.randn(3, layer.input_size).bfloat16()
            expected, _ = layer(x)
            copies = {k: v.clone() for k, v in layer.state_dict().items()}
            output, _ = torch.func.functional_call(layer, copies, (x,))
            self.assertTrue(torch.equal(output, expected), weights.name)

    def test_an_unpadded_layer_may_be_moved_by_an_offloader(self):
        """By nobody else: test_mxfp8_linear.py."""
        layer = mxfp8_linear(256, 512)
        layer.weight.data = layer.weight.data.clone()
        layer.mxfp8_weights.to_kernel_form()


class TestPackedExperts(LoadPathTestCase):
    """DeepSeek V1 packs its experts' weights into one buffer, which `fused_moe` reads."""

    expert = "model.layers.1.mlp.experts.2.down_proj.weight"
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=256,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        first_k_dense_replace=1,
        moe_layer_freq=1,
    )

    def build(self, quant_config, device="cpu") -> torch.nn.Module:
        with loaders.set_default_torch_dtype(torch.bfloat16), torch.device(device):
            return DeepseekForCausalLM(self.config, quant_config)

    def test_in_mxfp8_they_are_refused_before_a_byte_is_written(self):
        reason = "its weight was put into other memory"
        for serialized, device in itertools.product((True, False), ("cpu", "meta")):
            with self.subTest(serialized=serialized, device=device):
                model = self.build(mxfp8_config(serialized=serialized), device)
                dtype = torch.float8_e4m3fn if serialized else torch.bfloat16
                weight = torch.ones(256, 128).to(dtype)
                packed = model.model.layers[1].mlp.w2.view(torch.uint8)
                packed.fill_(7)
                with self.assertRaisesRegex(
                    ValueError, f"experts.down_proj .*{reason}"
                ):
                    model.load_weights([(self.expert, weight)])
                self.assertTrue(device == "meta" or (packed == 7).all())
                with self.assertRaisesRegex(ValueError, reason):
                    check_parameters(model)

    def test_in_bf16_they_load_beside_layers_in_mxfp8(self):
        model = self.build(mxfp8_config(ignored_layers=["experts"]))
        check_parameters(model)
        names = {w.layer.prefix.rpartition(".")[2] for w in mxfp8_weights_of(model)}
        self.assertEqual(names, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
        weight = torch.full((256, 128), 3, dtype=torch.bfloat16)
        model.load_weights([(self.expert, weight)])
        self.assertTrue(torch.equal(model.model.layers[1].mlp.w2[2], weight))


if __name__ == "__main__":
    unittest.main()
