"""MXFP8 weights on every branch of sglang's weight loaders."""

import unittest
from unittest import mock

import torch

from sglang.srt.layers import linear, parameter
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.mxfp8 import weights
from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    init_single_process_parallel_state,
    mxfp8_config,
    random_mxfp8,
    same_bytes,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="default")

K = 512
# Heads of 32 rows; one key-value head goes to both of two ranks.
HEADS, KV_HEADS, HEAD = 8, 1, 32
GATE_UP, QKV = [256, 128], [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
ALONE, RANKS = ((0, 1),), ((0, 1), (0, 2), (1, 2))  # (rank, of how many)
REPLICATED = ("k", "v")
COLUMN, ROW = 0, 1  # the dimension that is split
LAYERS = (  # class, its arguments, rows of each shard, shard ids, dimension
    (ReplicatedLinear, (K, 256), [256], (None,), COLUMN),
    (ColumnParallelLinear, (K, 256), [256], (None,), COLUMN),
    (RowParallelLinear, (K, 256), [256], (None,), ROW),
    (MergedColumnParallelLinear, (K, GATE_UP), GATE_UP, (0, 1), COLUMN),
    (QKVParallelLinear, (K, HEAD, HEADS, KV_HEADS), QKV, "qkv", COLUMN),
)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def concatenated(tensors) -> torch.Tensor:
    return torch.cat([as_bytes(t) for t in tensors]).view(tensors[0].dtype)


def shard_of(tensor: torch.Tensor, rank: int, size: int, dim: int = COLUMN):
    return as_bytes(tensor).chunk(size, dim)[rank]


class TestE8M0ScalesOnEveryBranch(CustomTestCase):
    """Checkpoints are (bf16, e4m3, scale), as `random_mxfp8` gives them."""

    serialized = True

    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.enterClassContext(fp8_gemm_backend("flashinfer_trtllm"))

    def build(self, cls, *sizes, rank=(0, 1)):
        """A layer of a rank, with a scale full of a byte that no test loads."""
        ranks = dict(zip(("tp_rank", "tp_size"), rank))
        layer = cls(
            *sizes,
            bias=False,
            params_dtype=torch.bfloat16,
            quant_config=mxfp8_config(serialized=self.serialized),
            prefix="m.proj",
            **({} if cls is ReplicatedLinear else ranks),
        )
        layer.weight_scale_inv.data.fill_(255)
        return layer

    def load(self, layer, tensors, *shard_id):
        """The weight and the scale, as float8_e8m0fnu."""
        _, weight, scale = tensors
        scale = scale.view(torch.float8_e8m0fnu)
        layer.weight.weight_loader(layer.weight, weight, *shard_id)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *shard_id)

    def branches(self, ranks):
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

    def test_every_class(self):
        """As a checkpoint has it that is fused on disk, and shard by shard."""
        for cls, sizes, rows, shard_ids, dim in LAYERS:
            parts = [random_mxfp8(n, K, seed) for seed, n in enumerate(rows)]
            ways = [[([concatenated(kind) for kind in zip(*parts)],)]]
            if len(parts) > 1:
                ways.append(list(zip(parts, shard_ids)))
            for rank in self.branches(ALONE if cls is ReplicatedLinear else RANKS):
                held = self.held_by(rank, parts, shard_ids, dim)
                for loads in ways:
                    layer = self.build(cls, *sizes, rank=rank)
                    for tensors in loads:
                        self.load(layer, *tensors)
                    self.assert_holds(layer, *held)

    def held_by(self, rank, parts, shard_ids, dim) -> list:
        """Bytes of the weight and of the scale that a rank has of these parts."""
        weights, scales = zip(*(part[1:] for part in parts))
        return [
            torch.cat(
                [
                    as_bytes(t) if i in REPLICATED else shard_of(t, *rank, dim)
                    for i, t in zip(shard_ids, kind)
                ]
            )
            for kind in (weights, scales)
        ]

    def test_a_checkpoint_that_ends_within_the_last_rank(self):
        """Its rest is zeros, as in Qwen2.5-VL's MLP."""
        for rest in (128, K // 2):
            tensors = random_mxfp8(256, K - rest)
            padded = [
                torch.nn.functional.pad(as_bytes(tensor), (0, width))
                for tensor, width in zip(tensors[1:], (rest, rest // 32))
            ]
            for rank in self.branches(RANKS[1:]):
                layer = self.build(RowParallelLinear, K, 256, rank=rank)
                self.load(layer, tensors)
                self.assert_holds(layer, *(shard_of(t, *rank, ROW) for t in padded))


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
        layer = self.build(QKVParallelLinear, K, HEAD, HEADS, KV_HEADS)
        weight = torch.ones(sum(QKV), K)
        self.load(layer, (weight.bfloat16(),))
        before = layer.weight.clone(), layer.weight_scale_inv.clone()
        for number in (float("nan"), float("inf"), -float("inf")):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                bad = (2 * weight).to(dtype)
                bad[-1, -1] = number
                for tensor, shard in ((bad, ()), (bad[-HEAD:], ("v",))):
                    layer.mxfp8_weights.to_kernel_form()
                    part = r" \(shard v\)" if shard else ""
                    message = f"m.proj.weight{part} holds NaN or infinity"
                    with self.subTest(number=number, dtype=dtype, part=part):
                        with self.assertRaisesRegex(ValueError, message):
                            self.load(layer, (tensor,), *shard)
                        layer.mxfp8_weights.to_checkpoint_form()
                        self.assert_holds(layer, *before)

    def test_another_loader_that_does_not_copy_is_an_error(self):
        layer = self.build(ReplicatedLinear, K, 256)
        with self.assertRaisesRegex(RuntimeError, "does not copy what it loads"):
            layer.mxfp8_weights.write(
                lambda param, loaded: None, layer.weight, torch.ones(256, K)
            )


if __name__ == "__main__":
    unittest.main()
