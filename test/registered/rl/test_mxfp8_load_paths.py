"""Every way to fill an MXFP8 model but the updates of a running server, on a CPU.

Real upstream loaders load a tiny Llama in this process; FlashInfer's kernels are emulated.
Stand-ins, where the real thing needs hardware or a service: an in-memory `redis` module,
a gloo group of two processes in place of NCCL (fp8 sent as bytes), a `checkpoint_engine`
module that calls what it was given, offloaders that find nothing to move on a CPU.
"""

import contextlib
import copy
import datetime
import functools
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import types
import unittest
from collections import defaultdict
from unittest import mock

import torch
from transformers import LlamaConfig

from sglang.srt.connector import BaseConnector, create_remote_connector
from sglang.srt.connector.remote_instance import RemoteInstanceConnector
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.mxfp8.layout import swizzled_scale_numel
from sglang.srt.layers.quantization.mxfp8.lifecycle import (
    check_mxfp8_disk_update,
    mxfp8_checkpoint_form,
    mxfp8_weights_of,
)
from sglang.srt.layers.quantization.mxfp8.weights import Form, check_parameters
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_loader import loader as loaders
from sglang.srt.models.deepseek import DeepseekForCausalLM
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.utils import init_custom_process_group
from sglang.srt.utils.offloader import (
    BaseOffloader,
    NoopOffloader,
    OffloaderV1,
    OffloaderV2,
    set_offloader,
)
from sglang.srt.utils.weight_checker import WeightChecker
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    fused_parameters,
    init_single_process_parallel_state,
    load_on_cpu,
    mxfp8_config,
    reference_linear,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")

REAL_MODEL = os.environ.get("MXFP8_TEST_MODEL")
# No layer of it has padding in its kernel form.
UNPADDED = dict(intermediate_size=512)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def runner_of(model: torch.nn.Module, **attributes) -> ModelRunner:
    """A model runner that has its methods, the model, and nothing else."""
    runner = ModelRunner.__new__(ModelRunner)
    runner.model = model
    vars(runner).update(tp_rank=0, tp_size=1, gpu_id=0, device="cpu", **attributes)
    return runner


checkpoint = functools.cache(tiny_llama_tensors)


class LoadPathTestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.enterClassContext(fp8_gemm_backend("flashinfer_trtllm"))
        cls.directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.tensors = [checkpoint(seed) for seed in range(2)]
        cls.paths = [
            write_checkpoint(os.path.join(cls.directory, str(seed)), tensors)
            for seed, tensors in enumerate(cls.tensors)
        ]

    def assert_serves(self, model: torch.nn.Module, tensors: dict) -> None:
        """The layers multiply by `tensors`, and give them back byte for byte."""
        expected = fused_parameters(tensors)
        torch.manual_seed(0)
        for weights in mxfp8_weights_of(model):
            layer, name = weights.layer, weights.name
            self.assertTrue(weights.form == Form.KERNEL, name)
            x = torch.randn(3, layer.input_size).bfloat16()
            reference = reference_linear(
                x, expected[f"{name}.weight"], expected[f"{name}.weight_scale_inv"]
            )
            torch.testing.assert_close(
                layer(x)[0], reference.bfloat16(), rtol=0.02, atol=0.05, msg=name
            )
        with mxfp8_checkpoint_form(model):
            held = dict(model.named_parameters())
            for name, tensor in expected.items():
                self.assertTrue(
                    torch.equal(as_bytes(held[name].data), as_bytes(tensor)), name
                )

    def assert_updates(self, model: torch.nn.Module) -> None:
        """From checkpoint 0, through the model's loaders, to 1 and back."""
        for seed in (1, 0):
            model.load_weights(self.tensors[seed].items())
            self.assert_serves(model, self.tensors[seed])


class TestLoadFormats(LoadPathTestCase):
    def test_auto_reads_a_checkpoint(self):
        model = load_on_cpu(self.paths[0])
        self.assert_serves(model, self.tensors[0])
        self.assert_updates(model)

    def test_pt_reads_a_checkpoint(self):
        path = write_checkpoint(os.path.join(self.directory, "pt"), self.tensors[0])
        os.remove(os.path.join(path, "model.safetensors"))
        torch.save(self.tensors[0], os.path.join(path, "model.pt"))
        self.assert_serves(load_on_cpu(path, load_format="pt"), self.tensors[0])

    def test_dummy_can_be_served_and_updated(self):
        model = load_on_cpu(self.paths[0], load_format="dummy")
        for weights in mxfp8_weights_of(model):
            self.assertEqual(weights.form, Form.KERNEL)
            output, _ = weights.layer(
                torch.ones(2, weights.layer.input_size).bfloat16()
            )
            self.assertTrue(output.isfinite().all())
        self.assert_updates(model)

    def test_sharded_state_is_saved_and_loaded(self):
        model = load_on_cpu(self.paths[0])
        path = os.path.join(self.directory, "sharded")
        write_checkpoint(path, {})
        os.remove(os.path.join(path, "model.safetensors"))
        runner_of(model).save_sharded_model(path, max_size=1 << 20)
        self.assertGreater(len(os.listdir(path)), 2)
        self.assert_serves(model, self.tensors[0])
        loaded = load_on_cpu(path, load_format="sharded_state")
        self.assert_serves(loaded, self.tensors[0])
        self.assert_updates(loaded)

    def test_layered_is_refused(self):
        with self.assertRaisesRegex(ValueError, "load_weights_to_module"):
            load_on_cpu(self.paths[0], load_format="layered")

    def test_layered_is_refused_by_name_for_a_model_that_has_its_method(self):
        # Upstream gives it to models of torch's own linears only.
        def load_weights_to_module(*_):
            pass

        with mock.patch.object(
            LlamaForCausalLM,
            "load_weights_to_module",
            load_weights_to_module,
            create=True,
        ):
            with self.assertRaisesRegex(
                RuntimeError,
                "layers.0.self_attn.qkv_proj .flashinfer_trtllm.*--load-format auto",
            ):
                load_on_cpu(self.paths[0], load_format="layered")

    def test_flash_rl_is_refused(self):
        with self.assertRaisesRegex(
            RuntimeError, "qkv_proj .flashinfer_trtllm.*flash_rl.*--quantization mxfp8"
        ):
            load_on_cpu(self.paths[0], load_format="flash_rl")

    def test_a_transfer_engine_is_refused(self):
        engine = mock.Mock()
        refusal = self.assertRaisesRegex(
            RuntimeError, "qkv_proj .flashinfer_trtllm.*loader-backend nccl"
        )
        with self.subTest("the server that sends"), refusal:
            load_on_cpu(
                self.paths[0], remote_instance_weight_loader_transfer_engine=engine
            )
        registers = mock.patch.object(loaders, "register_memory_region")
        reads = mock.patch.object(
            loaders.RemoteInstanceModelLoader,
            "load_model_from_remote_instance_by_transfer_engine",
            return_value=True,
        )
        with self.subTest("the server that receives"), registers, reads, refusal:
            load_on_cpu(
                self.paths[0],
                load_format="remote_instance",
                remote_instance_weight_loader_backend="transfer_engine",
                remote_instance_weight_loader_transfer_engine=engine,
            )


class TestDiskUpdateFormats(LoadPathTestCase):
    def test_formats_that_cannot_update_are_refused(self):
        model = load_on_cpu(self.paths[0])
        config = types.SimpleNamespace(
            model_path=self.paths[0],
            dtype=torch.bfloat16,
            revision=None,
            quantization="mxfp8",
        )
        runner = runner_of(model, model_config=config)
        for load_format in ("flash_rl", "dummy", "sharded_state", "remote"):
            with self.subTest(load_format):
                success, message = runner.update_weights_from_disk(
                    self.paths[1], load_format
                )
                self.assertFalse(success)
                self.assertRegex(message, f"{load_format}.*Nothing was written")
                self.assertEqual(config.model_path, self.paths[0])
                self.assert_serves(model, self.tensors[0])
        self.assert_updates(model)

    def test_pt_files_are_checked(self):
        model = load_on_cpu(self.paths[0])
        config = types.SimpleNamespace(
            model_path=self.paths[0], revision=None, quantization="mxfp8"
        )
        directory = write_checkpoint(os.path.join(self.directory, "pt1"), {})
        os.remove(os.path.join(directory, "model.safetensors"))
        file = os.path.join(directory, "model.pt")

        def refusal():
            return check_mxfp8_disk_update(
                model, config, loaders.get_model_loader, directory, "pt"
            )

        torch.save({**self.tensors[1], "epoch": 3}, file)
        self.assertIsNone(refusal())
        torch.save({}, file)
        self.assertRegex(refusal(), "takes nothing of 0 tensors")
        name = "model.layers.1.mlp.down_proj.weight"
        for change, reason in (
            ({name: self.tensors[1][name].bfloat16()}, "got torch.bfloat16"),
            ({name: self.tensors[1][name][:-1]}, r"is \[512, 544\], got \[511, 544\]"),
        ):
            torch.save({**self.tensors[1], **change}, file)
            self.assertRegex(refusal(), f"{reason}.*Nothing was written")
        lacking = dict(self.tensors[1])
        del lacking[f"{name}_scale_inv"]
        torch.save(lacking, file)
        self.assertRegex(
            refusal(), "lacks the scale of model.layers.1.mlp.down_proj.weight"
        )
        os.truncate(file, os.path.getsize(file) // 2)
        self.assertRegex(refusal(), "cannot be read.*Nothing was written")
        self.assert_serves(model, self.tensors[0])


class TestMemorySaver(LoadPathTestCase):
    """Its pause and resume need CUDA; what they do to a layer's memory is done here."""

    def test_an_update_restores_memory_that_came_back_with_other_bytes(self):
        model = load_on_cpu(self.paths[0])
        generator = torch.Generator().manual_seed(0)
        for weights in mxfp8_weights_of(model):
            for param in (weights.layer.weight, weights.layer.weight_scale_inv):
                storage = param.untyped_storage()  # with the padding
                raw = torch.empty(0, dtype=torch.uint8).set_(storage)
                raw.random_(generator=generator)
        self.assert_updates(model)


class InMemoryRedis:
    """What RedisConnector asks of a redis client; every client shares one store."""

    store = {}

    def __init__(self, host, port):
        pass

    def get(self, key):
        return self.store.get(key)

    def set(self, key, value):
        self.store[key] = value.encode() if isinstance(value, str) else bytes(value)

    def scan(self, cursor, match):
        prefix = match.removesuffix("*")
        return 0, [key.encode() for key in self.store if key.startswith(prefix)]

    def close(self):
        pass


class TestRemoteKeyValue(LoadPathTestCase):
    def setUp(self):
        redis = types.SimpleNamespace(Redis=InMemoryRedis)
        self.enterContext(mock.patch.dict(sys.modules, redis=redis))
        self.addCleanup(InMemoryRedis.store.clear)
        # Connectors take over signals.
        for number in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))

    def test_a_model_is_saved_and_loaded(self):
        url = "redis://localhost:6379/tiny"
        model = load_on_cpu(self.paths[0])
        runner = runner_of(model, model_config=mock.Mock(model_path=self.paths[0]))
        # 0.5.9 forgets to pass the device when it saves.
        with mock.patch.object(
            loaders,
            "create_remote_connector",
            lambda url, device="cpu": create_remote_connector(url, device),
        ):
            runner.save_remote_model(url)
        self.assert_serves(model, self.tensors[0])
        original = loaders.RemoteModelLoader.load_model

        def load_model(loader, *, model_config, device_config):
            model_config.model_weights = url  # as the server does for a remote URL
            return original(
                loader, model_config=model_config, device_config=device_config
            )

        with mock.patch.object(loaders.RemoteModelLoader, "load_model", load_model):
            loaded = load_on_cpu(self.paths[0], load_format="remote")
        self.assert_serves(loaded, self.tensors[0])
        self.assert_updates(loaded)


class GlooInstanceConnector(RemoteInstanceConnector):
    """Stand-in: NCCL's group of two, on gloo."""

    def __init__(self, url, device):
        BaseConnector.__init__(self, url)  # the class itself asks for CUDA

    def build_group(self, **_):
        port = int(self.url.rsplit(":", 1)[1])
        self._model_update_group = join_weights_group(port, rank=1)


def join_weights_group(port: int, rank: int):
    return init_custom_process_group(
        backend="gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        timeout=datetime.timedelta(seconds=120),
        world_size=2,
        rank=rank,
        group_name=f"weights_{port}_0",
    )


@contextlib.contextmanager
def gloo_for_nccl():
    """gloo carries no fp8, and a CPU has no CUDA to wait for."""
    broadcast = torch.distributed.broadcast
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (torch.cuda, "synchronize", lambda: None),
            (torch.cuda, "empty_cache", lambda: None),
            (loaders, "trigger_transferring_weights_request", lambda *_: None),
            (loaders, "create_remote_connector", GlooInstanceConnector),
            (
                torch.distributed,
                "broadcast",
                lambda tensor, **kw: broadcast(as_bytes(tensor.detach()), **kw),
            ),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def receive_from_instance(path: str, port: int) -> torch.nn.Module:
    with gloo_for_nccl():
        return load_on_cpu(
            path,
            load_format="remote_instance",
            tp_rank=0,
            remote_instance_weight_loader_backend="nccl",
            remote_instance_weight_loader_seed_instance_ip="127.0.0.1",
            remote_instance_weight_loader_seed_instance_service_port=0,
            remote_instance_weight_loader_send_weights_group_ports=[port],
        )


class TestRemoteInstance(LoadPathTestCase):
    def test_a_server_gets_its_weights_from_another(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        receiver = subprocess.Popen(
            [sys.executable, __file__, "receive", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.addCleanup(receiver.kill)
        model = load_on_cpu(self.paths[1])
        runner = runner_of(model, _weights_send_group=defaultdict(lambda: None))
        with gloo_for_nccl():
            group = join_weights_group(port, rank=0)
            runner._weights_send_group[f"weights_{port}_0"] = group
            success, message = runner.send_weights_to_remote_instance(
                "127.0.0.1", str(port), "weights"
            )
        self.assertTrue(success, message)
        self.assert_serves(model, self.tensors[1])
        output, _ = receiver.communicate(timeout=120)
        self.assertEqual(receiver.returncode, 0, output)


def receive_and_check(port: int) -> None:
    """What the second server of TestRemoteInstance does; it reads config 0, gets 1."""
    TestRemoteInstance.setUpClass()
    try:
        test = TestRemoteInstance()
        model = receive_from_instance(test.paths[0], port)
        test.assert_serves(model, test.tensors[1])
        test.assert_updates(model)
    finally:
        TestRemoteInstance.doClassCleanups()


class TestWeightsChecker(LoadPathTestCase):
    def test_an_update_restores_what_reset_made_random(self):
        model = load_on_cpu(self.paths[0])
        runner = runner_of(model)
        runner._weight_checker = WeightChecker(runner)
        with torch.no_grad():
            runner.check_weights("snapshot")
            self.assert_serves(model, self.tensors[0])
            runner.check_weights("reset_tensors")
        layer = mxfp8_weights_of(model)[0]
        self.assertEqual(layer.form, Form.KERNEL)
        with mxfp8_checkpoint_form(model):
            held = layer.layer.weight_scale_inv
            self.assertGreater(held.unique().numel(), 200)
        self.assert_updates(model)


class TestCheckpointEngine(LoadPathTestCase):
    def setUp(self):
        """A `checkpoint_engine` that hands over what it was asked for in buckets."""
        self.sent = []

        def update_weights_from_ipc(_, handle, device_id, run, post_hook):
            for bucket in self.sent:
                run(bucket)
            post_hook()

        worker = types.ModuleType("checkpoint_engine.worker")
        worker.update_weights_from_ipc = update_weights_from_ipc
        package = types.ModuleType("checkpoint_engine")
        modules = {"checkpoint_engine": package, "checkpoint_engine.worker": worker}
        for name in ("update", "checkpoint_engine_worker"):
            modules[f"sglang.srt.checkpoint_engine.{name}"] = None
        self.enterContext(mock.patch.dict(sys.modules, modules))
        for name in modules:
            if name.startswith("sglang"):
                del sys.modules[name]
        update = types.ModuleType("update")
        update.main = None
        sys.modules["sglang.srt.checkpoint_engine.update"] = update
        from sglang.srt.checkpoint_engine import checkpoint_engine_worker

        extension = checkpoint_engine_worker.SGLangCheckpointEngineWorkerExtensionImpl
        for owner, name, value in (
            (extension, "get_device_uuid", "GPU-0"),
            (torch.cuda, "current_device", 0),
        ):
            self.enterContext(mock.patch.object(owner, name, return_value=value))
        # The post hook moves parameters to the GPU.
        self.enterContext(
            mock.patch.object(
                loaders, "device_loading_context", lambda *_: contextlib.nullcontext()
            )
        )

    def test_buckets_over_ipc(self):
        model = load_on_cpu(self.paths[0])
        runner = runner_of(model)
        request = types.SimpleNamespace(zmq_handles={"GPU-0": "ipc://stand-in"})
        for seed in (1, 1, 0):
            items = list(self.tensors[seed].items())
            self.sent = [items[start : start + 5] for start in range(0, len(items), 5)]
            success, message = runner.update_weights_from_ipc(request)
            self.assertTrue(success, message)
            self.assert_serves(model, self.tensors[seed])
        name = "model.layers.0.mlp.down_proj.weight"
        self.sent = [[(name, self.tensors[1][name].bfloat16())]]
        success, message = runner.update_weights_from_ipc(request)
        self.assertFalse(success)
        self.assertIn("holds torch.float8_e4m3fn, got torch.bfloat16", message)
        self.assert_serves(model, self.tensors[0])


class MovesNothing(OffloaderV2):
    """Stand-in: V2 makes a CUDA stream at once."""

    def __init__(self):
        pass

    wrap_modules = BaseOffloader.wrap_modules


class TestOffload(LoadPathTestCase):
    @contextlib.contextmanager
    def offloader(self, offloader):
        set_offloader(offloader)
        try:
            yield
        finally:
            set_offloader(NoopOffloader())

    def test_padded_layers_are_refused_at_start(self):
        for offloader in (OffloaderV1(1 << 30), MovesNothing()):
            with self.subTest(type(offloader).__name__), self.offloader(offloader):
                with self.assertRaisesRegex(
                    RuntimeError,
                    "gate_up_proj .flashinfer_trtllm.*does not fit.*--cpu-offload-gb",
                ):
                    load_on_cpu(self.paths[0])

    def test_unpadded_layers_are_served(self):
        tensors = checkpoint(**UNPADDED)
        path = os.path.join(self.directory, "unpadded")
        write_checkpoint(path, tensors, **UNPADDED)
        for offloader in (OffloaderV1(1 << 30), MovesNothing()):
            with self.subTest(type(offloader).__name__), self.offloader(offloader):
                model = load_on_cpu(path)
                self.assert_serves(model, tensors)
                model.load_weights(tensors.items())
                self.assert_serves(model, tensors)

    def test_a_layer_computes_with_copies_of_its_parameters(self):
        """As V1 does: the parameters live elsewhere, and each forward gets copies."""
        tensors = checkpoint(**UNPADDED)
        path = os.path.join(self.directory, "copies")
        model = load_on_cpu(write_checkpoint(path, tensors, **UNPADDED))
        for weights in mxfp8_weights_of(model):
            layer = weights.layer
            x = torch.randn(3, layer.input_size).bfloat16()
            expected, _ = layer(x)
            copies = {k: v.clone() for k, v in layer.state_dict().items()}
            output, _ = torch.func.functional_call(layer, copies, (x,))
            self.assertTrue(torch.equal(output, expected), weights.name)

    def test_a_padded_layer_that_was_moved_says_so(self):
        weights = mxfp8_weights_of(load_on_cpu(self.paths[0]))[2]
        weights.to_checkpoint_form()
        scale = weights.layer.weight_scale_inv
        scale.data = scale.data.clone()
        with self.assertRaisesRegex(ValueError, "gate_up_proj.*CPU offload"):
            weights.to_kernel_form()

    def test_an_unpadded_layer_may_be_moved_by_an_offloader_alone(self):
        for offloader in (OffloaderV1(0), NoopOffloader()):
            with self.subTest(type(offloader).__name__), self.offloader(offloader):
                bf16 = dict(bias=False, params_dtype=torch.bfloat16)
                layer = ReplicatedLinear(512, 256, **bf16, quant_config=mxfp8_config())
                layer.weight.data = layer.weight.data.clone()
                if isinstance(offloader, OffloaderV1):
                    layer.mxfp8_weights.to_kernel_form()
                else:
                    with self.assertRaisesRegex(ValueError, "its weight was put into"):
                        layer.mxfp8_weights.to_kernel_form()


class TestPackedExperts(LoadPathTestCase):
    """DeepSeek V1 packs its experts' weights into one buffer, which `fused_moe` reads."""

    @staticmethod
    def build(quant_config, device="cpu", dtype=torch.bfloat16):
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=256,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            first_k_dense_replace=1,
            moe_layer_freq=1,
        )
        with loaders.set_default_torch_dtype(dtype), torch.device(device):
            return DeepseekForCausalLM(config, quant_config)

    def test_in_mxfp8_they_are_refused_before_a_byte_is_written(self):
        expert = "model.layers.1.mlp.experts.2.down_proj"
        refusal = "experts.down_proj .*its weight was put into other memory"
        for serialized, device in itertools.product((True, False), ("cpu", "meta")):
            with self.subTest(serialized=serialized, device=device):
                model = self.build(mxfp8_config(serialized=serialized), device)
                weight = torch.ones(256, 128, dtype=torch.bfloat16)
                if serialized:
                    weight = weight.to(torch.float8_e4m3fn)
                packed = model.model.layers[1].mlp.w2.view(torch.uint8)
                if device == "cpu":
                    packed.fill_(7)
                with self.assertRaisesRegex(ValueError, refusal):
                    model.load_weights([(f"{expert}.weight", weight)])
                self.assertTrue(device == "meta" or (packed == 7).all())
                with self.assertRaisesRegex(ValueError, "its weight was put into"):
                    check_parameters(model)

    def test_in_bf16_they_load_beside_layers_in_mxfp8(self):
        model = self.build(mxfp8_config(ignored_layers=["experts"]))
        check_parameters(model)
        names = {w.layer.prefix.rpartition(".")[2] for w in mxfp8_weights_of(model)}
        self.assertEqual(names, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
        weight = torch.full((256, 128), 3, dtype=torch.bfloat16)
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        model.load_weights([(name, weight)])
        self.assertTrue(torch.equal(model.model.layers[1].mlp.w2[2], weight))


class TestOneCopy(LoadPathTestCase):
    def assert_one_copy(self, model: torch.nn.Module) -> None:
        """Read from the storages: weight and scale, as the kernels need them, no more."""
        for weights in mxfp8_weights_of(model):
            layer = weights.layer
            n, k = layer.weight.shape
            tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
            for owner in (layer, weights):
                loose = {
                    name: value
                    for name, value in vars(owner).items()
                    if isinstance(value, torch.Tensor)
                }
                tensors |= loose
            held = {
                name: t.untyped_storage().nbytes()
                for name, t in tensors.items()
                if name != "bias"
            }
            expected = {
                "weight": n * k,
                "weight_scale_inv": swizzled_scale_numel(n, k // 32),
            }
            self.assertTrue(
                weights.form == Form.KERNEL and weights.backend.is_flashinfer()
            )
            self.assertEqual(held, expected, weights.name)
            rows, groups = -(-n // 128) * 128, -(-k // 128) * 4
            self.assertEqual(held["weight_scale_inv"], rows * groups)

    def test_a_model_of_the_shape_of_llama_3_8b(self):
        """All of it on the meta device, where storages have sizes; a layer in memory."""
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            rope_theta=5e5,
        )
        small = copy.copy(config)
        small.num_hidden_layers, small.vocab_size = 1, 256
        for device, config in (("meta", config), ("cpu", small)):
            with loaders.set_default_torch_dtype(torch.bfloat16), torch.device(device):
                model = LlamaForCausalLM(config, mxfp8_config())
            layers = mxfp8_weights_of(model)
            addresses = [p.data_ptr() for p in model.parameters()]
            for weights in layers:
                self.assertTrue(weights.backend.is_flashinfer_trtllm())
                weights.to_kernel_form()
            self.assertEqual(len(layers), 4 * config.num_hidden_layers)
            self.assert_one_copy(model)
            self.assertEqual(addresses, [p.data_ptr() for p in model.parameters()])

    @unittest.skipUnless(REAL_MODEL, "MXFP8_TEST_MODEL names no checkpoint")
    def test_the_real_model(self):
        self.assert_one_copy(load_on_cpu(REAL_MODEL))

    def test_the_tiny_model_after_updates(self):
        model = load_on_cpu(self.paths[0])
        self.assert_updates(model)
        self.assert_one_copy(model)


if __name__ == "__main__":
    if sys.argv[1:2] == ["receive"]:
        receive_and_check(int(sys.argv[2]))
    else:
        unittest.main()
