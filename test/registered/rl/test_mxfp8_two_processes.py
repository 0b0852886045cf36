"""MXFP8 models in two real processes (gloo): two ranks of one, and a server that gets its
weights from another.

Kernels are emulated. gloo stands in for NCCL, with fp8 sent as bytes.
"""

import contextlib
import datetime
import os
import re
import tempfile
import unittest
from collections import defaultdict
from unittest import mock

import torch

from sglang.srt.connector import BaseConnector
from sglang.srt.connector.remote_instance import RemoteInstanceConnector
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.mxfp8.agreement import (
    agree_to_write,
    run_weight_update,
)
from sglang.srt.layers.quantization.mxfp8.weights import mxfp8_weights_of
from sglang.srt.model_loader import loader as loaders
from sglang.srt.utils import init_custom_process_group
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TinyModelTestCase,
    as_bytes,
    fp8_gemm_backend,
    free_port,
    fused_parameters,
    init_parallel_state,
    load_on_cpu,
    model_runner,
    reference_linear,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="default")

# Half of a down_proj of 576 columns is a multiple of 32, and not of 128.
CHANGES = dict(intermediate_size=576)
DOWN = "model.layers.1.mlp.down_proj.weight"


def setUpModule() -> None:
    if torch.distributed.is_initialized():
        raise unittest.SkipTest("this process is in a group: run this file by itself")


def fork_two(run, *args) -> None:
    """run(0, *args) and run(1, *args) in processes of their own; raises what they raise.

    They begin as this one, which therefore starts no threads and joins no group.
    """
    torch.multiprocessing.start_processes(run, args, nprocs=2, start_method="fork")


class TestTwoRanks(CustomTestCase):
    def test_they_compute_and_update_together(self):
        with tempfile.TemporaryDirectory() as directory:
            fork_two(run_rank, free_port(), directory)


def run_rank(rank: int, port: int, directory: str) -> None:
    """Load a rank's shards, multiply, update, multiply again."""
    torch.set_num_threads(1)
    os.environ["SGLANG_NCCL_SO_PATH"] = "none"  # a CPU host has none
    parallel_state.set_custom_all_reduce(False)
    init_parallel_state(rank, 2, port)
    first, second, third = (tiny_llama_tensors(seed, **CHANGES) for seed in range(3))
    path = write_checkpoint(f"{directory}/{rank}", first, **CHANGES)
    with fp8_gemm_backend("flashinfer_trtllm"):
        model = load_on_cpu(path)
        assert_computes(model, first)
        model.load_weights(second.items())
        assert_computes(model, second)
        part = {n: t for n, t in third.items() if "k_proj" in n}
        model.load_weights(part.items())
        assert_computes(model, second | part)
        assert_agrees(model, rank, third)
        assert_computes(model, second | part)
    torch.distributed.destroy_process_group()


def assert_agrees(model, rank: int, tensors: dict) -> None:
    """What one rank refuses, or fails to do, none writes."""
    group = parallel_state.get_tp_group().cpu_group
    bad = {**tensors, DOWN: tensors[DOWN].bfloat16()}
    partly, written = "may be partially updated", []

    def fail(message="lost on rank 1"):
        raise EOFError(message)

    def write(*refusals):
        """Two models in one update, a draft and its target."""
        for refusal in refusals:
            agree_to_write(refusal)
            written.append(refusal)
        return True, "Success."

    for on_rank_0, on_rank_1, reason, writes in (
        (lambda: model.load_weights(tensors.items()), fail, "lost on rank 1", 0),
        (
            lambda: model.load_weights(tensors.items()),
            lambda: model.load_weights(bad.items()),
            "got torch.bfloat16.*Nothing was written",
            0,
        ),
        (
            lambda: write(None, None),
            lambda: write(None, ValueError("not on rank 1")),
            f"not on rank 1.*{partly}",
            1,
        ),
        (
            lambda: write(None, None),
            lambda: write(None) and fail("lost between two models"),
            f"lost between two models.*{partly}",
            1,
        ),
    ):
        written.clear()
        update = on_rank_1 if rank else on_rank_0
        success, message = run_weight_update(group, update)
        assert not success and re.search(reason, message), message
        assert written == [None] * writes, written


def assert_computes(model: torch.nn.Module, tensors: dict) -> None:
    """Each layer, over both ranks, gives what the whole weight gives."""
    rank, whole = torch.distributed.get_rank(), fused_parameters(tensors)
    torch.manual_seed(0)
    for weights in mxfp8_weights_of(model):
        layer, name = weights.layer, weights.name
        weight, scale = (whole[f"{name}.{n}"] for n in ("weight", "weight_scale_inv"))
        x = torch.randn(3, weight.shape[1]).bfloat16()
        expected = reference_linear(x, weight, scale)
        if isinstance(layer, RowParallelLinear):
            output, _ = layer(x.chunk(2, 1)[rank].contiguous())
        else:
            output = gathered(layer, layer(x)[0])
        error = (output.double() - expected).norm() / expected.norm()
        assert error < 5e-3, f"{name}: {error}"


def gathered(layer, output: torch.Tensor) -> torch.Tensor:
    """The output of a fused column-parallel layer, from those of its two ranks."""
    outputs = [torch.empty_like(output) for _ in range(2)]
    torch.distributed.all_gather(outputs, output.contiguous())
    by_part = zip(*(o.split(layer.output_partition_sizes, 1) for o in outputs))
    if not isinstance(layer, QKVParallelLinear):
        return torch.cat([torch.cat(part, 1) for part in by_part], 1)
    q, k, v = by_part
    for replicas in (k, v):
        assert torch.equal(*replicas)
    return torch.cat([*q, k[0], v[0]], 1)


class TestRemoteInstance(CustomTestCase):
    def test_a_server_gets_its_weights_from_another(self):
        fork_two(send_or_receive, free_port())


def send_or_receive(rank: int, port: int) -> None:
    """Rank 0 serves checkpoint b; rank 1 reads the config of a, and gets the weights."""
    torch.set_num_threads(1)
    TinyModelTestCase.setUpClass()
    test = TinyModelTestCase()
    try:
        with gloo_for_nccl():
            model = receive(test.path_a, port) if rank else send(test.path_b, port)
        test.assert_serves(model, test.b)
        test.assert_updates(model)
    finally:
        TinyModelTestCase.doClassCleanups()


def send(path: str, port: int) -> torch.nn.Module:
    model = load_on_cpu(path)
    runner = model_runner(model, _weights_send_group=defaultdict(lambda: None))
    runner._weights_send_group[f"weights_{port}_0"] = join_weights_group(port, rank=0)
    success, message = runner.send_weights_to_remote_instance(
        "127.0.0.1", str(port), "weights"
    )
    assert success, message
    return model


def receive(path: str, port: int) -> torch.nn.Module:
    return load_on_cpu(
        path,
        load_format="remote_instance",
        tp_rank=0,
        remote_instance_weight_loader_backend="nccl",
        remote_instance_weight_loader_seed_instance_ip="127.0.0.1",
        remote_instance_weight_loader_seed_instance_service_port=0,
        remote_instance_weight_loader_send_weights_group_ports=[port],
    )


class GlooInstanceConnector(RemoteInstanceConnector):
    """NCCL's group of two, on gloo."""

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
    send_bytes = lambda tensor, **kw: broadcast(as_bytes(tensor.detach()), **kw)
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (torch.cuda, "synchronize", lambda: None),
            (torch.cuda, "empty_cache", lambda: None),
            (loaders, "trigger_transferring_weights_request", lambda *_: None),
            (loaders, "create_remote_connector", GlooInstanceConnector),
            (torch.distributed, "broadcast", send_bytes),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


if __name__ == "__main__":
    unittest.main()
