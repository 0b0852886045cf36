"""MXFP8 weights on every branch of sglang's weight loaders, and over two real ranks."""

import os
import socket
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import torch

from sglang.srt.distributed import parallel_state
from sglang.srt.layers import linear, parameter
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.mxfp8 import weights
from sglang.srt.layers.quantization.mxfp8.agreement import run_weight_update
from sglang.srt.layers.quantization.mxfp8.lifecycle import mxfp8_weights_of
from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    fused_parameters,
    init_parallel_state,
    init_single_process_parallel_state,
    load_on_cpu,
    mxfp8_config,
    random_mxfp8,
    reference_linear,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")

K = 512
# Heads of 32 rows; one key-value head goes to both of two ranks.
HEADS, KV_HEADS, HEAD = 8, 1, 32
GATE_UP, QKV = [256, 128], [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
RANKS = ((0, 1), (0, 2), (1, 2))  # (rank, of how many)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def build(cls, *sizes, tensor_parallel=None, serialized=True):
    """A layer of this rank, with a scale full of a byte that no test loads."""
    ranks = tensor_parallel and dict(zip(("tp_rank", "tp_size"), tensor_parallel))
    layer = cls(
        *sizes,
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=mxfp8_config(serialized=serialized),
        prefix="m.proj",
        **(ranks or {}),
    )
    layer.weight_scale_inv.data.fill_(255)
    return layer


def shard_of(tensor: torch.Tensor, rank: int, size: int, dim: int = 0):
    return as_bytes(tensor).chunk(size, dim)[rank]


class TestE8M0ScalesOnEveryBranch(CustomTestCase):
    """Checkpoints are (bf16, e4m3, scale), as `random_mxfp8` gives them."""

    serialized = True

    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.enterClassContext(fp8_gemm_backend("flashinfer_trtllm"))

    def build(self, *args, **kwargs):
        return build(*args, **kwargs, serialized=self.serialized)

    def load(self, layer, tensors, *shard_id):
        """The weight and the scale, as float8_e8m0fnu."""
        _, weight, scale = tensors
        scale = scale.view(torch.float8_e8m0fnu)
        layer.weight.weight_loader(layer.weight, weight, *shard_id)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *shard_id)

    def branches(self, ranks=RANKS):
        """Each rank, on the CPU's loaders and on the GPU's."""
        for is_cpu in (True, False):
            cpu = [mock.patch.object(m, "_is_cpu", is_cpu) for m in (linear, parameter)]
            for rank in ranks:
                with self.subTest(is_cpu=is_cpu, rank=rank), cpu[0], cpu[1]:
                    yield rank

    def assert_holds(self, layer, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.assertTrue(same_bytes(layer.weight, weight))
        self.assertTrue(same_bytes(layer.weight_scale_inv, scale))
        self.assertEqual(layer.mxfp8_weights.unwritten(), [])

    def test_replicated(self):
        tensors = random_mxfp8(256, K)
        for _ in self.branches(ranks=RANKS[:1]):
            layer = self.build(ReplicatedLinear, K, 256)
            self.load(layer, tensors)
            self.assert_holds(layer, *tensors[1:])

    def test_column(self):
        tensors = random_mxfp8(256, K)
        for rank in self.branches():
            layer = self.build(ColumnParallelLinear, K, 256, tensor_parallel=rank)
            self.load(layer, tensors)
            self.assert_holds(layer, *(shard_of(t, *rank) for t in tensors[1:]))

    def test_row(self):
        tensors = random_mxfp8(256, K)
        for rank in self.branches():
            layer = self.build(RowParallelLinear, K, 256, tensor_parallel=rank)
            self.load(layer, tensors)
            self.assert_holds(layer, *(shard_of(t, *rank, dim=1) for t in tensors[1:]))

    def test_a_checkpoint_that_ends_within_the_last_rank(self):
        """Its rest is zeros, as in Qwen2.5-VL's MLP."""
        for rest in (128, K // 2):
            tensors = random_mxfp8(256, K - rest)
            padded = [
                torch.nn.functional.pad(as_bytes(tensor), (0, width))
                for tensor, width in zip(tensors[1:], (rest, rest // 32))
            ]
            for rank in self.branches(ranks=RANKS[1:]):
                layer = self.build(RowParallelLinear, K, 256, tensor_parallel=rank)
                self.load(layer, tensors)
                self.assert_holds(layer, *(shard_of(t, *rank, dim=1) for t in padded))

    def merged(self):
        """Parts of a merged layer, and what a rank holds of their weights and scales."""
        parts = [random_mxfp8(n, K, seed) for seed, n in enumerate(GATE_UP)]
        return parts, lambda rank: [
            torch.cat([shard_of(t, *rank) for t in kind])
            for kind in list(zip(*parts))[1:]
        ]

    def qkv(self):
        parts = [random_mxfp8(n, K, seed) for seed, n in enumerate(QKV)]

        def held(rank):
            # Query heads are split, the one key-value head is replicated.
            return [
                torch.cat([shard_of(q, *rank), as_bytes(k), as_bytes(v)])
                for q, k, v in list(zip(*parts))[1:]
            ]

        return parts, held

    def assert_loads_fused(self, cls, sizes, shard_ids, parts, held):
        whole = [
            torch.cat([as_bytes(t) for t in kind]).view(kind[0].dtype)
            for kind in zip(*parts)
        ]
        for rank in self.branches():
            layer = self.build(cls, *sizes, tensor_parallel=rank)
            for shard_id, part in zip(shard_ids, parts):
                self.load(layer, part, shard_id)
            self.assert_holds(layer, *held(rank))
            layer = self.build(cls, *sizes, tensor_parallel=rank)
            self.load(layer, whole)
            self.assert_holds(layer, *held(rank))

    def test_merged_by_shard_and_fused_on_disk(self):
        self.assert_loads_fused(
            MergedColumnParallelLinear, (K, GATE_UP), (0, 1), *self.merged()
        )

    def test_qkv_by_shard_and_fused_on_disk(self):
        sizes = (K, HEAD, HEADS, KV_HEADS)
        self.assert_loads_fused(QKVParallelLinear, sizes, "qkv", *self.qkv())


class TestQuantizedOnEveryBranch(TestE8M0ScalesOnEveryBranch):
    """`--quantization mxfp8` quantizes this rank's shard, and nothing else."""

    serialized = False

    def load(self, layer, tensors, *shard_id):
        quantized = layer.__dict__.setdefault("quantized", [])

        def count(x):
            quantized.append(x.numel())
            return quantize(x)

        with mock.patch.object(weights, "quantize", count):
            layer.weight.weight_loader(layer.weight, tensors[0], *shard_id)

    def assert_holds(self, layer, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().assert_holds(layer, weight, scale)
        self.assertLessEqual(sum(layer.quantized), layer.weight.numel())

    def test_a_tensor_with_nan_or_infinity_is_refused_before_it_is_written(self):
        for number in (float("nan"), float("inf"), -float("inf")):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                layer = self.build(QKVParallelLinear, K, HEAD, HEADS, KV_HEADS)
                weight = torch.ones(QKV[0] + 2 * QKV[1], K, dtype=dtype)
                self.load(layer, (weight,))
                before = layer.weight.clone(), layer.weight_scale_inv.clone()
                layer.mxfp8_weights.to_kernel_form()
                bad = 2 * weight
                bad[-1, -1] = number
                for tensor, part in ((bad, ""), (bad[-HEAD:], r" \(shard v\)")):
                    with self.subTest(number=number, dtype=dtype, part=part):
                        shard = part[-4:-2] and ("v",)
                        with self.assertRaisesRegex(
                            ValueError, f"m.proj.weight{part} holds NaN or infinity"
                        ):
                            self.load(layer, (tensor,), *shard)
                        layer.mxfp8_weights.to_checkpoint_form()
                        self.assertTrue(same_bytes(layer.weight, before[0]))
                        self.assertTrue(same_bytes(layer.weight_scale_inv, before[1]))

    def test_another_loader_that_does_not_copy_is_an_error(self):
        layer = self.build(ReplicatedLinear, K, 256)
        with self.assertRaisesRegex(RuntimeError, "does not copy what it loads"):
            layer.mxfp8_weights.write(
                lambda param, loaded: None, layer.weight, torch.ones(256, K)
            )


# Half of a down_proj of 576 columns is a multiple of 32, and not of 128.
CHANGES = dict(intermediate_size=576)


class TestTwoRanks(CustomTestCase):
    def test_two_gloo_ranks_compute_and_update_together(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "model")
            write_checkpoint(path, tiny_llama_tensors(**CHANGES), **CHANGES)
            ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "rank", str(rank), str(port), path],
                    # A CPU host: torch's own NCCL is not to be found.
                    env={**os.environ, "SGLANG_NCCL_SO_PATH": "none"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank in range(2)
            ]
            for rank in ranks:
                self.addCleanup(rank.kill)
            for rank in ranks:
                output, _ = rank.communicate(timeout=120)
                self.assertEqual(rank.returncode, 0, output)


def run_rank(rank: int, port: int, path: str) -> None:
    """One of two processes: load a model's shards, multiply, update, multiply again."""
    parallel_state.set_custom_all_reduce(False)
    init_parallel_state(rank, 2, port)
    with fp8_gemm_backend("flashinfer_trtllm"):
        model = load_on_cpu(path)
        assert_computes(model, tiny_llama_tensors(**CHANGES))
        update = tiny_llama_tensors(seed=1, **CHANGES)
        model.load_weights(update.items())
        assert_computes(model, update)
        other = tiny_llama_tensors(seed=2, **CHANGES)
        update |= {n: t for n, t in other.items() if "k_proj" in n}
        model.load_weights((n, t) for n, t in update.items() if "k_proj" in n)
        assert_computes(model, update)
        assert_refused_everywhere(model, rank, other)
        assert_computes(model, update)
    torch.distributed.destroy_process_group()


def assert_refused_everywhere(model, rank: int, tensors: dict) -> None:
    """What one rank refuses, or fails to read, neither writes."""
    group = parallel_state.get_tp_group().cpu_group
    name = "model.layers.1.mlp.down_proj.weight"
    bad = {**tensors, name: tensors[name].bfloat16()}

    def lost():
        raise EOFError("lost on rank 1")

    for on_rank_1, reason in (
        (lambda: model.load_weights(bad.items()), "got torch.bfloat16"),
        (lost, "lost on rank 1"),
    ):
        update = on_rank_1 if rank else lambda: model.load_weights(tensors.items())
        success, message = run_weight_update(group, update)
        assert not success and reason in message, message


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
    if sys.argv[1:2] == ["rank"]:
        run_rank(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        unittest.main()
