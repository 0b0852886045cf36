"""Random MXFP8 layers through load, forward, updates and restore, against float64.

MXFP8_FUZZ_SECONDS (30) bounds the time; MXFP8_FUZZ_SEED starts with that batch of
examples, as it was printed.
"""

import math
import os
import random
import time
import unittest
from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import List, Optional, Tuple

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from sglang.srt.environ import envs
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.mxfp8.layout import swizzled_scale_numel
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    init_single_process_parallel_state,
    mxfp8_config,
    reference_linear,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")

SECONDS = float(os.environ.get("MXFP8_FUZZ_SECONDS", 30))
SEED = os.environ.get("MXFP8_FUZZ_SEED")
BATCH = 25  # examples from one seed
# Twice what trtllm, the backend with most to go wrong, needs.
BACKENDS = "flashinfer_trtllm", "flashinfer_trtllm", "flashinfer_cutlass"
DTYPES = torch.bfloat16, torch.bfloat16, torch.float16
WEIGHT, SCALE = "weight", "weight_scale_inv"
GUARD, GUARD_BYTES = 0xA5, 256


@dataclass(frozen=True)
class Write:
    """Tensors given to the weight loaders: of one shard, or of all (`shard` None).

    With `fused`, all shards as one tensor. "refused" is a weight of another dtype.
    """

    what: str
    shard: Optional[int]
    fused: bool = False
    raw: bool = False  # e4m3 as uint8 and E8M0 as float8_e8m0fnu


@dataclass(frozen=True)
class Update:
    writes: Tuple[Write, ...]
    restore_first: bool
    process_between: bool
    leading: Tuple[int, ...]  # dimensions of the input of the forward pass after it


@dataclass(frozen=True)
class Case:
    """A layer over `tp` ranks, and what happens to it.

    Attributes:
        widths: rows of each shard of the whole layer.
        heads: of a qkv layer, (query heads, key-value heads).
        k: columns of the whole layer.
    """

    kind: str
    widths: Tuple[int, ...]
    k: int
    tp: int
    heads: Tuple[int, int]
    backend: str
    layout: str
    dtype: torch.dtype
    bias: bool
    leading: Tuple[int, ...]
    updates: Tuple[Update, ...]
    seed: int

    @property
    def shard_ids(self) -> tuple:
        return {"merged": tuple(range(len(self.widths))), "qkv": tuple("qkv")}.get(
            self.kind, (None,)
        )

    def split(self, shard: int) -> int:
        """Over how many ranks a shard is split; beyond that it is replicated."""
        if self.kind == "replicated":
            return 1
        return min(self.tp, self.heads[1]) if self.kind == "qkv" and shard else self.tp


def sizes(unit: int, most: int):
    """Multiples of `unit`, more often the smallest and those about 128 and 256."""
    return st.one_of(
        st.integers(1, most // unit).map(lambda i: unit * i),
        st.sampled_from([unit, 3 * unit, 128, 128 + unit, 256, 256 + unit]),
    )


COLUMNS = st.one_of(st.sampled_from([256, 512, 768]), sizes(32, 512))
ROWS = sizes(128, 512), sizes(32, 512), sizes(1, 300)
LEADING = st.one_of(
    st.sampled_from([(1,), (8,), (9,), (128,), (129,), (300,)]),
    st.tuples(st.integers(0, 300)),
    st.tuples(st.integers(0, 5), st.integers(0, 20)),
    st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 5)),
)
WHAT = st.sampled_from([("weight",), ("scale",), ("weight", "scale"), ("refused",)])


@st.composite
def writes(draw, shards: int):
    what = draw(st.permutations(draw(WHAT)))
    shard = draw(st.none() | st.integers(0, shards - 1))
    fused = shard is None and draw(st.booleans())
    return [Write(w, shard, fused, draw(st.booleans())) for w in what]


@st.composite
def updates(draw, shards: int):
    groups = draw(st.lists(writes(shards), min_size=1, max_size=3))
    parts = [write for group in groups for write in group]
    return Update(
        tuple(draw(st.permutations(parts))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(LEADING),
    )


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(["replicated", "column", "row", "merged", "qkv"]))
    tp = 1 if kind == "replicated" else draw(st.sampled_from([1, 2, 4]))
    k, heads = draw(COLUMNS) * (tp if kind == "row" else 1), (0, 0)
    rows = draw(st.sampled_from(ROWS))
    if kind == "merged":
        widths = [tp * n for n in draw(st.lists(rows, min_size=2, max_size=3))]
    elif kind == "qkv":
        head = draw(st.sampled_from([8, 32, 64, 80, 96, 128]))
        kv = draw(st.sampled_from([1, 2, 4]))
        heads = draw(st.sampled_from([1, 2])) * max(tp, kv), kv
        widths = [head * heads[0], head * kv, head * kv]
    else:
        widths = [draw(rows) * (tp if kind == "column" else 1)]
    return Case(
        kind,
        tuple(widths),
        k,
        tp,
        heads,
        draw(st.sampled_from(BACKENDS)),
        draw(st.sampled_from(["auto", "8x4", "128x4"])),
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(LEADING),
        tuple(draw(st.lists(updates(len(widths)), max_size=3))),
        draw(st.integers(0, 2**16)),
    )


def build(case: Case, rank: int):
    """The layer of one rank, with guard bytes behind each parameter's storage."""
    kwargs = dict(
        bias=case.bias,
        params_dtype=case.dtype,
        quant_config=mxfp8_config(),
        prefix="m.proj",
    )
    if case.kind != "replicated":
        kwargs.update(tp_rank=rank, tp_size=case.tp)
    with fp8_gemm_backend(case.backend):
        with envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.override(case.layout):
            layer = _make(case, kwargs)
    for name in (WEIGHT, SCALE):
        param = getattr(layer, name)
        _add_guard(param)
        # From here on, that is the memory that was made for it.
        room = StorageWeakRef(param.untyped_storage())
        layer.mxfp8_weights._rooms[name] = room
    return layer


def _make(case: Case, kwargs: dict):
    if case.kind == "merged":
        return MergedColumnParallelLinear(case.k, list(case.widths), **kwargs)
    if case.kind == "qkv":
        head = case.widths[1] // case.heads[1]
        return QKVParallelLinear(case.k, head, *case.heads, **kwargs)
    if case.kind == "row":
        return RowParallelLinear(case.k, *case.widths, reduce_results=False, **kwargs)
    cls = ReplicatedLinear if case.kind == "replicated" else ColumnParallelLinear
    return cls(case.k, *case.widths, **kwargs)


def _add_guard(param: torch.nn.Parameter) -> None:
    size = param.untyped_storage().nbytes()
    room = torch.full((size + GUARD_BYTES,), GUARD, dtype=torch.uint8)
    param.data = room[: param.numel()].view(param.dtype).view(param.shape)


class Life:
    """One case: its ranks' layers, and the checkpoint's bytes that they must hold."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        self.layers = [build(case, rank) for rank in range(case.tp)]
        self.backend = self.layers[0].mxfp8_weights.backend
        self.held = {name: [None] * len(case.widths) for name in (WEIGHT, SCALE)}
        self.addresses = [self._addresses(layer) for layer in self.layers]
        self.bias = [self._random(width).to(case.dtype) for width in case.widths]
        if case.bias:
            for rank, layer in enumerate(self.layers):
                layer.bias.data = self._of_rank(self.bias, rank, of_bias=True)

    def run(self) -> None:
        self.write(Write("weight", None))
        self.write(Write("scale", None))
        for layer in self.layers:
            assert layer.mxfp8_weights.unwritten() == []
        self.process()
        self.process()  # once is enough
        self.check_forward(self.case.leading)
        for update in self.case.updates:
            self.update(update)
        self.restore()

    def update(self, update: Update) -> None:
        if update.restore_first:
            self.restore()
        for write in update.writes:
            self.write(write)
            if update.process_between:
                self.process()
        self.process()
        self.check_forward(update.leading)

    def process(self) -> None:
        for layer in self.layers:
            layer.quant_method.process_weights_after_loading(layer)
        self.check_memory()

    def restore(self) -> None:
        for rank, layer in enumerate(self.layers):
            layer.quant_method.restore_weights_before_loading(layer)
            for name in (WEIGHT, SCALE):
                expected = self._of_rank(self.held[name], rank)
                actual = getattr(layer, name).data.view(torch.uint8)
                assert torch.equal(actual, expected), f"{name} of rank {rank}"
        self.check_memory()

    def write(self, write: Write) -> None:
        """Give every rank's loaders the tensors, and remember what they must leave."""
        if write.what == "refused":
            return self._write_refused()
        name = WEIGHT if write.what == "weight" else SCALE
        held, shard_ids = self.held[name], self.case.shard_ids
        shards = range(len(held)) if write.shard is None else [write.shard]
        for shard in shards:
            held[shard] = self._random_bytes(name, self.case.widths[shard])
        tensors = [(held[shard], shard_ids[shard]) for shard in shards]
        if write.fused:
            tensors = [(torch.cat(held), None)]
        for tensor, shard_id in tensors:
            for layer in self.layers:
                tensor = tensor.view(_dtype(name, write.raw))
                _load(getattr(layer, name), tensor, shard_id)

    def _write_refused(self) -> None:
        wrong = torch.zeros(self.case.widths[0], self.case.k)
        for layer in self.layers:
            try:
                _load(layer.weight, wrong, self.case.shard_ids[0])
            except ValueError:
                continue
            raise AssertionError("a float32 weight was taken")

    def check_forward(self, leading: Tuple[int, ...]) -> None:
        case = self.case
        groups = self._random(*leading, case.k // 32, 32) * self._scales(leading)
        x = groups.flatten(-2).to(case.dtype)
        inputs = [x] * case.tp if case.kind != "row" else x.chunk(case.tp, -1)
        outputs = [layer(i)[0] for layer, i in zip(self.layers, inputs)]
        for output in outputs:
            assert output.dtype == case.dtype
        weight = torch.cat(self.held[WEIGHT]).view(torch.float8_e4m3fn)
        expected, error = self._reference(x, weight, torch.cat(self.held[SCALE]))
        actual = self._whole([output.double() for output in outputs])
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        wrong = ((actual - expected).abs() > error).nonzero().tolist()
        assert not wrong, f"{len(wrong)} of {actual.numel()} differ, first {wrong[0]}"

    def _reference(self, x, weight, scale) -> Tuple[torch.Tensor, torch.Tensor]:
        """The float64 output, and how far rounding may take the layer's from it."""
        weight_only, case = self.backend.is_weight_only(), self.case
        parts = case.tp if case.kind == "row" else 1
        partial = [
            reference_linear(*group, quantize_input=not weight_only)
            for group in zip(*(t.chunk(parts, -1) for t in (x, weight, scale)))
        ]
        expected = sum(partial)
        absolute = sum(part.abs() for part in partial)
        if case.bias:
            bias = torch.cat(self.bias).double()
            expected, absolute = expected + bias, absolute + 2 * bias.abs()
        # Each rank rounds its part once, and once more with a bias; fp32 sums add a bit.
        step = torch.finfo(case.dtype).eps
        magnitude = x.double().square().sum(-1, keepdim=True).sqrt() * math.sqrt(case.k)
        largest = 448.0 * torch.exp2(scale.double().max() - 127)
        error = step * absolute + 1e-6 * magnitude * largest + 1e-6
        if (
            weight_only and case.dtype == torch.float16
        ):  # whose small weights are rounded
            error += 2.0**-25 * x.double().abs().sum(-1, keepdim=True)
        return expected, error

    def _whole(self, outputs: List[torch.Tensor]) -> torch.Tensor:
        """The whole layer's output from those of its ranks."""
        case = self.case
        if case.kind == "row":
            return sum(outputs)
        splits = [case.split(shard) for shard in range(len(case.widths))]
        sizes = [width // split for width, split in zip(case.widths, splits)]
        by_shard = zip(*(output.split(sizes, -1) for output in outputs))
        # A replicated part is the same on the ranks that share it; one of each is taken.
        return torch.cat(
            [p for parts, s in zip(by_shard, splits) for p in parts[:: case.tp // s]],
            -1,
        )

    def _of_rank(self, tensors, rank: int, of_bias: bool = False) -> torch.Tensor:
        """What a rank holds of the shards' tensors."""
        case = self.case
        if case.kind == "row":
            return tensors[0] if of_bias else tensors[0].chunk(case.tp, 1)[rank]
        splits = [case.split(shard) for shard in range(len(tensors))]
        return torch.cat(
            [t.chunk(s)[rank * s // case.tp] for t, s in zip(tensors, splits)]
        )

    def check_memory(self) -> None:
        """Parameters stay where they were, and nothing is written behind them."""
        for layer, addresses in zip(self.layers, self.addresses):
            assert self._addresses(layer) == addresses, "a parameter moved"
            for name in (WEIGHT, SCALE):
                storage = getattr(layer, name).data.untyped_storage()
                tail = torch.tensor([], dtype=torch.uint8).set_(storage)
                assert (tail[-GUARD_BYTES:] == GUARD).all(), f"bytes behind {name}"

    def _addresses(self, layer) -> tuple:
        params = [getattr(layer, name) for name in (WEIGHT, SCALE)]
        n, groups = layer.weight_scale_inv.shape
        if layer.mxfp8_weights.backend.is_flashinfer():
            room = params[1].untyped_storage().nbytes() - GUARD_BYTES
            assert room == swizzled_scale_numel(n, groups)
        return tuple((id(param), param.data_ptr()) for param in params)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _scales(self, leading: Tuple[int, ...]) -> torch.Tensor:
        shape = (*leading, self.case.k // 32, 1)
        return torch.exp2(torch.randint(-4, 3, shape, generator=self.generator))

    def _random_bytes(self, name: str, rows: int) -> torch.Tensor:
        """Any e4m3 bytes but NaN; scales that differ, some of them zero."""
        if name == SCALE:
            shape = rows, self.case.k // 32
            scale = torch.randint(113, 123, shape, generator=self.generator)
            return scale.masked_fill(scale == 113, 0).to(torch.uint8)
        shape = rows, self.case.k
        value = torch.randint(0, 256, shape, generator=self.generator)
        return value.masked_fill(value & 127 == 127, 0).to(torch.uint8)


def _dtype(name: str, raw: bool) -> torch.dtype:
    if name == WEIGHT:
        return torch.uint8 if raw else torch.float8_e4m3fn
    return torch.float8_e8m0fnu if raw else torch.uint8


def _load(param, tensor: torch.Tensor, shard_id) -> None:
    param.weight_loader(param, tensor, *([] if shard_id is None else [shard_id]))


class TestMXFP8Fuzz(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        torch.set_num_threads(1)  # small tensors: more would only wait for each other

    def test_random_layers_live_as_float64_says(self):
        end = time.monotonic() + SECONDS
        first = random.randrange(2**32) if SEED is None else int(SEED)
        self.ran = Counter()
        # Whole batches only, so that a seed gives the same examples on any machine.
        for batch_seed in count(first):
            self.run_batch(batch_seed)
            if time.monotonic() >= end:
                break
        summary = ", ".join(f"{n} {name}" for name, n in sorted(self.ran.items()))
        print(f"MXFP8_FUZZ_SEED={first}..{batch_seed}: {summary}")
        self.assertGreaterEqual(self.ran["examples"], BATCH)
        if self.ran["examples"] >= 8 * BATCH:
            for backend in (*BACKENDS, "weight_only"):
                self.assertGreater(self.ran[backend], 0, backend)

    def run_batch(self, batch_seed: int) -> None:
        @seed(batch_seed)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases())
        def run(case):
            life = Life(case)
            life.run()
            self.ran.update(["examples", life.backend.value, f"tp{case.tp}", case.kind])
            self.ran["updates"] += len(case.updates)

        try:
            run()
        except BaseException as error:
            print(f"To repeat: MXFP8_FUZZ_SEED={batch_seed}")
            error.add_note(f"To repeat: MXFP8_FUZZ_SEED={batch_seed}")
            raise


if __name__ == "__main__":
    unittest.main()
