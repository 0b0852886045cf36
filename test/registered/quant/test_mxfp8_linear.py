"""MXFP8 linear layers of a real sglang, kernels emulated: their life, calls, loading."""

import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from random import Random
from unittest import mock

import flashinfer
import torch
from flashinfer.autotuner import AutoTuner, autotune
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import profile

from sglang.srt.environ import envs
from sglang.srt.layers import linear, parameter
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import emulation, layout, routing, weights
from sglang.srt.layers.quantization.mxfp8.lifecycle import as_mxfp8_raw_loader
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize, quantize
from sglang.srt.layers.quantization.mxfp8.scale_layout import SF_LAYOUTS
from sglang.srt.layers.quantization.mxfp8.weights import Form, HalfMoved
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    as_served,
    assert_multiplies,
    assert_product,
    for_random,
    load_mxfp8,
    loaded_mxfp8_linear,
    mxfp8_linear,
    random_mxfp8,
    same_bytes,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=70, suite="default")

BACKENDS = ("flashinfer_trtllm", "flashinfer_cutlass")
WEIGHT, SCALE = "weight", "weight_scale_inv"
RAW = {WEIGHT: torch.uint8, SCALE: torch.float8_e8m0fnu}  # the same bytes


def process(layer):
    layer.quant_method.process_weights_after_loading(layer)


def addresses(layer):
    return layer.weight.data_ptr(), layer.weight_scale_inv.data_ptr()


def concatenated(parts, dtype=torch.uint8) -> torch.Tensor:
    return torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)


class LinearTestCase(CustomTestCase):
    def assert_holds(self, layer, weight, scale):
        """As the checkpoint's bytes."""
        layer.quant_method.restore_weights_before_loading(layer)
        self.assertTrue(same_bytes(layer.weight.data, weight))
        self.assertTrue(same_bytes(layer.weight_scale_inv.data, scale))
        self.assertEqual(layer.mxfp8_weights.unwritten(), [])


class TestLife(LinearTestCase):
    @for_random(
        80,
        widths=[(8,), (32,), (96,), (128,), (160,), (200,), (576,), (960,), (1024,)]
        + [(256, 512), (128, 32), (96, 200, 128)],
        k=[32, 96, 128, 256, 288, 512, 768],
        m=[0, 1, 8, 9, 17, 128, 129],
        backend=("flashinfer_trtllm", *BACKENDS),
        dtype=(torch.bfloat16, torch.bfloat16, torch.float16),
        sf_layout=SF_LAYOUTS,
        online=(False, False, True),
        between=(False, True),
        seed=range(1 << 16),
    )
    def test_a_layer_is_loaded_multiplies_is_updated_and_is_restored(
        self, widths, k, m, backend, dtype, sf_layout, online, between, seed
    ):
        """A load, and updates of some weights and scales of some shards.

        `online` layers quantize bf16; `between` writes, layers go to kernel form.
        """
        torch.manual_seed(seed)
        random, n = Random(seed), sum(widths)
        size, cls = list(widths), MergedColumnParallelLinear
        if len(widths) == 1:
            size, cls = n, ReplicatedLinear
        with envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT.override(sf_layout):
            layer = mxfp8_linear(size, k, backend, cls, not online, params_dtype=dtype)
        at = addresses(layer)
        # What the layer should hold, and the part of each shard.
        whole = {WEIGHT: torch.zeros(n, k).to(torch.float8_e4m3fn)}
        whole[SCALE] = torch.zeros(n, k // 32, dtype=torch.uint8)
        parts = {name: tensor.split(widths) for name, tensor in whole.items()}
        writes = [*product((WEIGHT,) if online else parts, range(len(widths)))]
        for count in len(writes), *random.choices(range(1, len(writes) + 1), k=2):
            for name, i in random.sample(writes, count):
                weight, *quantized = random_mxfp8(
                    widths[i], k, random.randrange(1 << 16)
                )
                new, sent = dict(zip(parts, quantized)), weight
                if not online:
                    new = {name: new[name]}
                    sent = new[name].view(random.choice((new[name].dtype, RAW[name])))
                for written, tensor in new.items():
                    parts[written][i].copy_(tensor)
                param = getattr(layer, name)
                param.weight_loader(param, sent, *([i] if len(widths) > 1 else []))
                if between:
                    process(layer)
            process(layer)
            process(layer)  # once is enough
            x = torch.randn(m, k).to(dtype)
            assert_multiplies(layer, x, whole[WEIGHT], whole[SCALE])
            self.assert_one_copy(layer)
        self.assert_holds(layer, whole[WEIGHT], whole[SCALE])
        self.assertEqual(addresses(layer), at)

    def assert_one_copy(self, layer):
        """All tensors that the layer and its state hold, registered or not."""
        own = [*layer.parameters(), *layer.buffers()]
        own += [*vars(layer).values(), *vars(layer.mxfp8_weights).values()]
        storages = [t.untyped_storage() for t in own if isinstance(t, torch.Tensor)]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        (n, k), scale = layer.weight.shape, layer.weight_scale_inv
        self.assertEqual(scale.shape, (n, k // 32))
        is_padded = layer.mxfp8_weights.backend.is_flashinfer()
        room = layout.swizzled_scale_numel(n, k // 32) if is_padded else scale.numel()
        self.assertEqual(sorted(held.values()), sorted((n * k, room)))

    def test_loader_threads_write_parts_of_one_layer(self):
        """As DeepSeek's loader does; the first to write brings the layer back."""

        def slowly(*args):
            time.sleep(0.01)
            layout.unswizzle_scale_(*args)

        self.enterContext(mock.patch.object(weights, "unswizzle_scale_", slowly))
        widths = [128] * 16
        layer = mxfp8_linear(widths, 512, cls=MergedColumnParallelLinear)
        for seed in range(3):
            _, *tensors = random_mxfp8(sum(widths), 512, seed)
            parts = zip(*(t.split(widths) for t in tensors), range(len(widths)))
            with ThreadPoolExecutor(8) as pool:
                for part in [pool.submit(load_mxfp8, layer, *part) for part in parts]:
                    part.result()
            process(layer)
            self.assert_holds(layer, *tensors)
            process(layer)

    def test_mxfp8_quantizes_without_triton_kernels(self):
        """On a GPU, where the log says so once."""

        class OnAGpu(torch.Tensor):
            is_cuda = True

        plain = torch.randn(4, 64).bfloat16()
        self.addCleanup(fp8_utils._triton_downcast.cache_clear)
        fp8_utils._triton_downcast.cache_clear()
        with mock.patch.dict("sys.modules", triton_kernels=None):
            with self.assertLogs(fp8_utils.logger, "WARNING") as logs:
                for _ in range(2):
                    x = plain.as_subclass(OnAGpu)
                    found = fp8_utils.mxfp8_group_quantize(x)
                    for tensor, expected in zip(found, quantize(plain)):
                        self.assertTrue(same_bytes(tensor, expected))
        [line] = logs.output
        self.assertIn("triton_kernels cannot be imported", line)


HEADS = dict(total_num_heads=8, total_num_kv_heads=1)  # of 32 rows
RANKS = ((0, 1), (0, 2), (1, 2))  # (rank, of how many)
SHARDED = (  # class, its size, rows of its parts, their shard ids, the dimension split
    (ReplicatedLinear, 256, [256], [None], 0),
    (ColumnParallelLinear, 256, [256], [None], 0),
    (RowParallelLinear, 256, [256], [None], 1),
    (MergedColumnParallelLinear, [256, 128], [256, 128], [0, 1], 0),
    (QKVParallelLinear, 32, [256, 32, 32], "qkv", 0),
)


class TestLoaderBranches(LinearTestCase):
    """Each rank of each class, with the CPU's loaders and the GPU's: E8M0 scales keep
    their bytes, and of a bf16 weight a rank quantizes its own shard, and nothing else.
    """

    def branches(self, ranks):
        for rank, serialized, is_cpu in product(ranks, (True, False), (True, False)):
            of_linears = mock.patch.object(linear, "_is_cpu", is_cpu)
            of_parameters = mock.patch.object(parameter, "_is_cpu", is_cpu)
            with self.subTest(rank=rank, serialized=serialized, is_cpu=is_cpu):
                with of_linears, of_parameters:
                    yield rank, serialized

    def loaded(self, cls, size, rank, serialized, loads):
        """A layer of a rank after `loads` of (bf16, e4m3, scale) and a shard id."""
        more = dict(zip(("tp_rank", "tp_size"), rank))
        more = {} if cls is ReplicatedLinear else more
        more |= HEADS if cls is QKVParallelLinear else {}
        layer = mxfp8_linear(size, 512, cls=cls, serialized=serialized, **more)
        layer.weight_scale_inv.data.fill_(255)
        with mock.patch.object(weights, "quantize", side_effect=quantize) as quantizer:
            for (weight, values, scale), *shard in loads:
                if serialized:
                    load_mxfp8(layer, values, scale.view(RAW[SCALE]), *shard)
                else:
                    layer.weight.weight_loader(layer.weight, weight, *shard)
        quantized = sum(call.args[0].numel() for call in quantizer.call_args_list)
        self.assertLessEqual(quantized, layer.weight.numel())
        return layer

    @staticmethod
    def shard_of(tensor, rank, dim):
        return tensor.view(torch.uint8).chunk(rank[1], dim)[rank[0]]

    def test_every_class(self):
        """As a checkpoint has it that is fused on disk, and shard by shard."""
        for cls, size, rows, shard_ids, dim in SHARDED:
            parts = [random_mxfp8(n, 512, seed) for seed, n in enumerate(rows)]
            fused = [concatenated(kind, kind[0].dtype) for kind in zip(*parts)]
            ways = [[(fused,)]]
            if len(parts) > 1:
                ways.append(list(zip(parts, shard_ids)))
            ranks = RANKS[:1] if cls is ReplicatedLinear else RANKS
            for rank, serialized in self.branches(ranks):
                # The one key-value head goes to both ranks.
                held = [
                    concatenated(
                        t if i in ("k", "v") else self.shard_of(t, rank, dim)
                        for i, t in zip(shard_ids, kind)
                    )
                    for kind in list(zip(*parts))[1:]
                ]
                for loads in ways:
                    layer = self.loaded(cls, size, rank, serialized, loads)
                    self.assert_holds(layer, *held)

    def test_a_checkpoint_that_ends_within_the_last_rank(self):
        """Its rest is zeros, as in Qwen2.5-VL's MLP."""
        for rest in (128, 256):
            tensors = random_mxfp8(256, 512 - rest)
            padded = [
                torch.nn.functional.pad(tensor.view(torch.uint8), (0, width))
                for tensor, width in zip(tensors[1:], (rest, rest // 32))
            ]
            for rank, serialized in self.branches(RANKS[1:]):
                args = RowParallelLinear, 256, rank, serialized, [(tensors,)]
                held = [self.shard_of(tensor, rank, dim=1) for tensor in padded]
                self.assert_holds(self.loaded(*args), *held)

    def test_another_loader_that_does_not_copy_is_an_error(self):
        layer = mxfp8_linear(256, 512, serialized=False)
        with self.assertRaisesRegex(RuntimeError, "does not copy what it loads"):
            layer.mxfp8_weights.write(
                lambda param, loaded: None, layer.weight, torch.ones(256, 512)
            )


def triton_linear(
    input, weight, weight_scale, input_scale=None, bias=None, output_dtype=None
):
    """A stand-in for upstream's Triton linear, as strict as it is."""
    assert input.is_contiguous() and input.shape[0] > 0
    assert weight.shape[0] % 128 == 0 and weight.shape[1] % 128 == 0
    values = input
    if input_scale is None:
        values, input_scale = quantize(input)
    assert input_scale.shape == (input.shape[0], input.shape[1] // 32)
    x = dequantize(values, input_scale).double()
    return (x @ dequantize(weight, weight_scale).double().t()).to(output_dtype)


TRTLLM, CUTLASS = BACKENDS
CASES = (
    (TRTLLM, 256, 512, torch.bfloat16),  # 8x4 up to M = 128
    (TRTLLM, 160, 768, torch.bfloat16),  # N % 128 != 0: 128x4
    (TRTLLM, 2688, 256, torch.bfloat16),  # wide: 128x4
    (CUTLASS, 256, 288, torch.bfloat16),  # K / 32 = 9: padded groups
    (CUTLASS, 160, 576, torch.float16),
    ("triton", 256, 384, torch.bfloat16),
    ("triton", 128, 128, torch.float16),
    ("weight_only", 40, 96, torch.bfloat16),
    ("weight_only", 1000, 288, torch.float16),
    ("weight_only", 40, 96, torch.float32),
)


class TestCalls(CustomTestCase):
    """The real linear method over backends, M, N, K and dtypes, with a bias."""

    @classmethod
    def setUpClass(cls):
        stand_ins = dict(triton_mxfp8_blockscaled_linear=triton_linear)
        cls.enterClassContext(mock.patch.multiple(fp8_utils, **stand_ins))
        machine = mock.patch.multiple(
            routing,
            is_cuda=lambda: True,
            is_sm100_supported=lambda: True,
            get_device_capability=lambda: (12, 0),
        )
        cls.enterClassContext(machine)

    def every_layer(self):
        """For each of CASES the layer, its weight and its scale."""
        for backend, n, k, dtype in CASES:
            flag = TRTLLM if backend == "weight_only" else backend
            args = dict(params_dtype=dtype, bias=True)
            layer, weight, scale = loaded_mxfp8_linear(n, k, flag, **args)
            layer.bias.data.normal_()
            with self.subTest(backend=backend, n=n, k=k, dtype=dtype):
                self.assertEqual(layer.mxfp8_weights.backend.value, backend)
                yield layer, weight, scale

    def test_any_input(self):
        for layer, weight, scale in self.every_layer():
            k = weight.shape[1]
            ms = (0, 1, 2, 7, 8, 9, 127, 128, 129, 300)
            shapes = *((m,) for m in ms), (2, 0), (0, 3), (), (2, 3, 1)
            for x in (
                *(torch.randn(*shape, k) for shape in shapes),
                torch.randn(5, 2 * k)[:, ::2],
                torch.randn(k, 5).t(),
                torch.randn(2, k, 3).transpose(1, 2),
                torch.randn(4, k)[::2],
            ):
                assert_multiplies(layer, x.to(layer.params_dtype), weight, scale)

    def test_quantized_input_with_a_linear_or_a_128x4_scale(self):
        def check(x, *quantized):
            output = layer.quant_method.apply(layer, quantized)
            assert_product(output, x, weight, scale)

        for layer, weight, scale in self.every_layer():
            for m in (0, 5, 130):
                x = torch.randn(m, weight.shape[1]).bfloat16()
                values, x_scale = quantize(x)
                check(x, values, x_scale)
                check(x, values, layout.swizzle_scale(x_scale))
                check(x, values, x_scale.view(torch.float8_e8m0fnu))
                check(x, *(t.t().contiguous().t() for t in (values, x_scale)))
            x = torch.randn(2, 3, weight.shape[1]).bfloat16()
            values, x_scale = quantize(x.flatten(0, 1))
            check(x, values.view(2, 3, -1), x_scale.view(2, 3, -1))
            for wrong in (
                x_scale[:5],
                x_scale.t(),
                torch.cat([x_scale, x_scale]),
                layout.swizzle_scale(x_scale)[:-1],
                x_scale.float(),
            ):
                with self.assertRaisesRegex(ValueError, r"must be uint8 \[6, .*128x4"):
                    check(x, values, wrong)

    def test_the_kernels_get_the_layout_of_the_rule(self):
        self.addCleanup(fp8_utils._kernels.cache_clear)
        for n, k, up_to in (256, 512, 128), (160, 768, 0), (2688, 256, 0):
            layer, _, _ = loaded_mxfp8_linear(n, k)
            for m in (1, 128, 129):
                with self.subTest(n=n, m=m), mock.patch.object(
                    emulation, "mm_mxfp8", wraps=emulation.mm_mxfp8
                ) as gemm:
                    fp8_utils._kernels.cache_clear()
                    layer(torch.randn(m, k).bfloat16())
                    use_8x4 = gemm.call_args.kwargs["use_8x4_sf_layout"]
                    self.assertEqual(use_8x4, m <= up_to)

    def test_compiled_once_for_every_m(self):
        """One op per linear; the layout changes inside it, and nothing is recompiled."""
        for layer, weight, _ in self.every_layer():
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(
                lambda x: layer(x)[0], backend=counter, dynamic=True, fullgraph=True
            )
            for m in (2, 8, 9, 128, 129, 300, 0, 1):
                x = torch.randn(m, weight.shape[1]).to(layer.params_dtype)
                self.assertTrue(torch.equal(compiled(x), layer(x)[0]))
                if m > 1:  # torch.compile specializes on both
                    self.assertEqual(counter.frame_count, 1)
            nodes = counter.graphs[0].graph.nodes
            calls = [node.target for node in nodes if node.op == "call_function"]
            self.assertEqual(sum("sglang" in str(op) for op in calls), 1, calls)

    def test_the_op_has_a_right_fake(self):
        # Without padding: opcheck copies its inputs, and a copy carries only the view.
        layer, _, _ = loaded_mxfp8_linear(256, 512)
        x = torch.randn(9, 512).bfloat16()
        tensors = x, layer.weight, layer.weight_scale_inv, None
        # test_schema does arithmetic on its inputs, which fp8 has not.
        torch.library.opcheck(
            torch.ops.sglang.flashinfer_mxfp8_linear,
            (*tensors, torch.bfloat16, "trtllm", 8),
            test_utils="test_faketensor",
        )

    def test_the_two_halves_have_flashinfers_defaults(self):
        layer, weight, scale = loaded_mxfp8_linear(256, 512, CUTLASS)
        x = torch.randn(9, 512).bfloat16()
        a, a_scale = fp8_utils.flashinfer_mxfp8_quantize(x)
        room = weights.kernel_scale(layer.weight_scale_inv.data)
        output = fp8_utils.flashinfer_mm_mxfp8(
            a, layer.weight.t(), a_scale, room, out_dtype=torch.bfloat16
        )
        assert_product(output, x, weight, scale)


VIEWS = {"aten::as_strided", "aten::reshape", "aten::t", "aten::view"}


class TestOnFlashInfer(CustomTestCase):
    """FlashInfer's signatures and its tuner, around stubs in place of its kernels."""

    def test_the_gemm_is_not_tuned_before_0_6_14_nor_with_8x4(self):
        """Though it fails; others are tuned after it, and the log says so once."""
        fp8_utils._say_not_tuned.cache_clear()
        seen = []

        def gemm(**_):
            seen.append(AutoTuner.get().is_tuning_mode)
            raise MemoryError

        with autotune(), self.assertLogs("sglang", "INFO") as logs:
            for version, use_8x4, is_tuned in (
                ("0.6.7.post3", False, False),
                ("0.6.13.post1", False, False),
                ("0.6.14", True, False),
                ("0.6.14", False, True),
            ):
                found = mock.patch.object(fp8_utils, "flashinfer_version")
                with self.subTest(version, use_8x4=use_8x4), found as find:
                    find.return_value = version
                    guarded = fp8_utils._without_autotuning(gemm, AutoTuner.get())
                    with self.assertRaises(MemoryError):
                        guarded(use_8x4_sf_layout=use_8x4)
                    self.assertEqual(seen.pop(), is_tuned)
                    self.assertTrue(AutoTuner.get().is_tuning_mode)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("autotuner passes over MXFP8", logs.output[0])

    def test_a_call_is_not_tuned_and_has_a_few_views_beside_the_kernels(self):
        """No copy and no allocation, so the kernels get the tensors themselves."""
        n, k, m = 576, 768, 64  # their scale is padded
        quantized = torch.empty(m, k, dtype=torch.float8_e4m3fn), torch.empty(0).byte()
        output, tuning = torch.empty(m, n, dtype=torch.bfloat16), []

        def multiply(*_, **__):
            tuning.append(AutoTuner.get().is_tuning_mode)
            return output

        self.addCleanup(fp8_utils._kernels.cache_clear)
        for owner, name, stub in (
            (flashinfer, "mxfp8_quantize", dict(return_value=quantized)),
            (flashinfer, "mm_mxfp8", dict(side_effect=multiply)),
            (fp8_utils, "mxfp8_kernels_missing", dict(return_value="")),
        ):
            patch = mock.patch.object(owner, name, autospec=True, **stub)
            self.enterContext(patch)
        layers = [loaded_mxfp8_linear(n, k, backend)[0] for backend in BACKENDS]
        fp8_utils._kernels.cache_clear()
        for layer, (shape, views) in product(layers, (((m,), 2), ((2, m // 2), 4))):
            x = torch.randn(*shape, k).bfloat16()
            with torch.inference_mode(), autotune(), profile() as profiled:
                found = layer.quant_method.apply(layer, x, None)
            ops = [event.name for event in profiled.events() if not event.cpu_parent]
            self.assertLessEqual(set(ops), VIEWS)
            self.assertLessEqual(len(ops), views, ops)
            self.assertEqual(found.shape, (*shape, n))
        self.assertEqual(set(tuning), {False})


def named(i, weight, scale):
    """A layer's tensors as a checkpoint of `model_of` names them."""
    return [(f"layers.{i}.{WEIGHT}", weight), (f"layers.{i}.{SCALE}", scale)]


def model_of(*layers):
    """A model of these layers, not loaded yet."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)

    def load_weights(weights):
        for name, tensor in weights:
            param = model.get_parameter(name)
            param.weight_loader(param, tensor)

    model.load_weights = load_weights
    return model


class TestLoading(CustomTestCase):
    def test_what_is_no_weight_to_be_quantized_is_refused_by_name(self):
        _, *tensors = random_mxfp8(256, 512)
        layer = mxfp8_linear(256, 512, serialized=False)
        reasons = "quantizes bf16, fp16 or fp32", "makes the scales itself"
        for name, tensor, reason in zip(RAW, tensors, reasons):
            param = getattr(layer, name)
            with self.assertRaisesRegex(ValueError, f"m.proj.{name}.*{reason}"):
                param.weight_loader(param, tensor)

    def test_a_layer_without_scales_stops_the_load_by_name(self):
        full, bare = mxfp8_linear(256, 512), mxfp8_linear(256, 512)
        _, weight, scale = random_mxfp8(256, 512)
        bare.weight.weight_loader(bare.weight, weight)
        with self.assertRaisesRegex(
            ValueError, "1 MXFP8 tensors: layers.1.weight_scale_inv"
        ):
            as_served(model_of(full, bare), named(0, weight, scale))

    def test_a_load_holds_its_own_layers_and_no_others(self):
        served = mxfp8_linear(256, 512)
        with weights.deferred_processing():
            loading = mxfp8_linear(256, 512)
            with ThreadPoolExecutor() as pool:
                for layer in served, loading:
                    pool.submit(process, layer).result()
        self.assertEqual(served.mxfp8_weights.form, Form.KERNEL)
        self.assertNotEqual(loading.mxfp8_weights.form, Form.KERNEL)

    def test_a_custom_loader_calls_the_models_own_from_a_thread(self):
        """And writes past the loaders."""
        layers = mxfp8_linear(256, 512), mxfp8_linear(160, 512)
        model = as_served(model_of(*layers))
        first, second = (random_mxfp8(n, 512)[1:] for n in (256, 160))

        def custom_loader(model, _):
            with ThreadPoolExecutor() as pool:
                pool.submit(model.load_weights, named(0, *first)).result()
            layers[1].weight.data.copy_(second[0])
            layers[1].weight_scale_inv.data.copy_(second[1])

        as_mxfp8_raw_loader(custom_loader)(model, [])
        for layer, own in zip(layers, (first, second)):
            assert_multiplies(layer, torch.randn(3, 512).bfloat16(), *own)

    def test_other_models_are_left_alone(self):
        model = torch.nn.Linear(2, 2)
        written = mock.Mock()
        as_mxfp8_raw_loader(written)(model, [])
        written.assert_called_once_with(model, [])

    def test_a_parameter_that_is_not_alone_in_its_memory_is_refused(self):
        """Whatever put it there, before anything moves."""

        def move(model, param):
            param.data = param.data.clone()

        def shift(model, param):
            param.data = param.data[8:]

        def keep_a_view(model, param):
            model.w1 = param.data.view(-1)

        def tie(model, param):
            model.register_parameter("tied", param)

        for change, name in product((move, shift, keep_a_view, tie), RAW):
            with self.subTest(change.__name__, name=name):
                layers = [mxfp8_linear(160, 512) for _ in "ab"]
                model = model_of(*layers)
                change(model, getattr(layers[1], name))
                message = f"layers.1 .*its {name} was put into other memory"
                with self.assertRaisesRegex(ValueError, message):
                    as_served(model)
                for layer in layers:
                    self.assertNotEqual(layer.mxfp8_weights.form, Form.KERNEL)

    def test_a_layer_left_half_rearranged_stops_the_server(self):
        layers = mxfp8_linear(256, 512), mxfp8_linear(256, 512)
        tensors = [named(i, *random_mxfp8(256, 512, i)[1:]) for i in range(2)]
        model = as_served(model_of(*layers), tensors[0] + tensors[1])
        self.enterContext(mock.patch.object(weights, "_half_moved", None))
        runner = mock.MagicMock()
        ModelRunner.forward(runner, None)
        with mock.patch.object(weights, "shuffle_rows_", side_effect=MemoryError):
            with self.assertRaisesRegex(HalfMoved, "layers.0 .*MemoryError.*restart"):
                model.load_weights(tensors[0])
        # Also where a captured graph would run, which sees no layer.
        runner._forward_raw.reset_mock()
        with self.assertRaisesRegex(HalfMoved, "layers.0 .*half rearranged"):
            ModelRunner.forward(runner, None)
        runner._forward_raw.assert_not_called()
        with self.assertRaises(HalfMoved):
            model.load_weights(tensors[1])


if __name__ == "__main__":
    unittest.main()
