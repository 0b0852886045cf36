"""An MXFP8 model in two real processes (gloo), each a rank of it; kernels are emulated."""

import os
import re
import tempfile
import unittest

import torch

from sglang.srt.distributed import parallel_state
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.mxfp8 import agreement
from sglang.srt.layers.quantization.mxfp8.weights import mxfp8_weights_of
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    free_port,
    fused_parameters,
    init_parallel_state,
    load_on_cpu,
    reference_linear,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="default")

# Half of a down_proj of 576 columns is a multiple of 32, and not of 128.
CHANGES = dict(intermediate_size=576)
DOWN = "model.layers.1.mlp.down_proj.weight"


class TestTwoRanks(CustomTestCase):
    def test_they_compute_and_update_together(self):
        if torch.distributed.is_initialized():
            self.skipTest("this process is in a group: run this file by itself")
        # They begin as this process, which therefore starts no threads.
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.start_processes(
                run_rank, (free_port(), directory), nprocs=2, start_method="fork"
            )


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

    def write(*checks):
        """Two models in one update, a draft and its target."""
        for check in checks:
            agreement.agree_to_write(check)
            written.append(check)
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
            lambda: write(None, fail),
            f"lost on rank 1.*{partly}",
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
        success, message = agreement.run_weight_update(group, update)
        assert not success and re.search(reason, message), message
        assert (partly in message) == bool(writes), message
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


if __name__ == "__main__":
    unittest.main()
