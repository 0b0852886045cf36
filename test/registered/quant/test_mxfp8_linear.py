"""MXFP8 linear layers of a real sglang: selection, loading, one copy, forward, refusals."""

import time
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.environ import envs
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import weights
from sglang.srt.layers.quantization.mxfp8.layout import (
    shuffle_rows,
    swizzle_scale,
    swizzled_scale_numel,
    unswizzle_scale_,
)
from sglang.srt.layers.quantization.mxfp8.lifecycle import (
    as_mxfp8_raw_loader,
    load_served_model,
)
from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.srt.layers.quantization.mxfp8.routing import Mxfp8LinearBackend
from sglang.srt.layers.quantization.mxfp8.weights import (
    Form,
    HalfMoved,
    deferred_processing,
    kernel_scale,
)
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    for_random,
    fp8_gemm_backend,
    init_single_process_parallel_state,
    mxfp8_config,
    random_mxfp8,
    reference_linear,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")

TRTLLM = Mxfp8LinearBackend.FLASHINFER_TRTLLM
CUTLASS = Mxfp8LinearBackend.FLASHINFER_CUTLASS
WEIGHT_ONLY = Mxfp8LinearBackend.WEIGHT_ONLY
BACKENDS = ("flashinfer_trtllm", "flashinfer_cutlass")


def build(n, k, backend="flashinfer_trtllm", cls=ReplicatedLinear, **kwargs):
    config = mxfp8_config(serialized=kwargs.pop("serialized", True))
    arguments = dict(
        bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="m.proj"
    )
    with fp8_gemm_backend(backend):
        return cls(k, n, **{**arguments, **kwargs})


def load(layer, weight, scale, *shard_id):
    layer.weight.weight_loader(layer.weight, weight, *shard_id)
    layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *shard_id)


def named(i, weight, scale):
    """A layer's tensors as the checkpoint of `TestLoading.load_model` names them."""
    layer = f"layers.{i}"
    return [(f"{layer}.weight", weight), (f"{layer}.weight_scale_inv", scale)]


def process(layer):
    layer.quant_method.process_weights_after_loading(layer)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def held_tensors(layer):
    """All tensors that a layer and its MXFP8 state hold, registered or not."""
    owned = [*vars(layer).values(), *vars(layer.mxfp8_weights).values()]
    unregistered = [value for value in owned if isinstance(value, torch.Tensor)]
    return [*layer.parameters(), *layer.buffers(), *unregistered]


def load_unchecked(loader):
    """A model of no model class, so that there is no copy to check updates with."""
    with envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True):
        return load_served_model(loader, None, None)


class MXFP8TestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()


class TestLayerLife(MXFP8TestCase):
    @for_random(
        50,
        n=[8, 32, 96, 128, 160, 200, 576, 960, 1024],
        k=[32, 96, 128, 256, 288, 512, 576, 768],
        m=range(0, 18),
        backend=BACKENDS,
        bias=(False, True),
    )
    def test_any_shape_loads_multiplies_and_is_restored(self, n, k, m, backend, bias):
        layer = build(n, k, backend, bias=bias)
        _, weight, scale = random_mxfp8(n, k)
        load(layer, weight, scale)
        if bias:
            layer.bias.data = torch.randn(n).bfloat16()
        addresses = layer.weight.data_ptr(), layer.weight_scale_inv.data_ptr()
        process(layer)
        processed = layer.weight.clone(), kernel_form(layer)
        process(layer)
        self.assertTrue(same_bytes(layer.weight, processed[0]), "processed twice")
        self.assertTrue(same_bytes(kernel_form(layer), processed[1]))

        x = torch.randn(m, k).bfloat16()
        output, _ = layer(x)
        on_bf16 = layer.mxfp8_weights.backend.is_weight_only()
        expected = reference_linear(x, weight, scale, quantize_input=not on_bf16)
        if bias:
            expected = expected.bfloat16() + layer.bias
        self.assertEqual(output.dtype, torch.bfloat16)
        torch.testing.assert_close(output, expected.bfloat16(), rtol=0.02, atol=0.05)

        layer.quant_method.restore_weights_before_loading(layer)
        self.assertTrue(same_bytes(layer.weight, weight))
        self.assertTrue(same_bytes(layer.weight_scale_inv, scale))
        self.assertEqual(
            addresses, (layer.weight.data_ptr(), layer.weight_scale_inv.data_ptr())
        )

    def test_the_kernels_get_the_bytes_of_their_layout(self):
        n, k = 576, 1536
        _, weight, scale = random_mxfp8(n, k)
        for backend in BACKENDS:
            with self.subTest(backend):
                layer = build(n, k, backend)
                load(layer, weight, scale)
                process(layer)
                rows = shuffle_rows if backend == "flashinfer_trtllm" else lambda t: t
                self.assertTrue(
                    same_bytes(layer.weight, rows(weight.view(torch.uint8)))
                )
                self.assertTrue(
                    same_bytes(kernel_form(layer), swizzle_scale(rows(scale)))
                )

    def test_one_copy(self):
        n, k = 576, 1536
        swizzled = swizzled_scale_numel(n, k // 32)
        for backend, scale_bytes in (
            (TRTLLM, swizzled),
            (CUTLASS, swizzled),
            (WEIGHT_ONLY, n * k // 32),
        ):
            forced = envs.SGLANG_MXFP8_LINEAR_BACKEND.override(f"proj={backend.value}")
            with self.subTest(backend), forced:
                layer = build(n, k)
                self.assertEqual(layer.mxfp8_weights.backend, backend)
                load(layer, *random_mxfp8(n, k)[1:])
                process(layer)
                layer(torch.randn(3, k).bfloat16())
                held = {
                    t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in held_tensors(layer)
                }
                self.assertEqual(sorted(held.values()), sorted((n * k, scale_bytes)))
                self.assertEqual(layer.weight_scale_inv.shape, (n, k // 32))

    def test_fused_layers_load_shard_by_shard(self):
        q, k_, v = (
            random_mxfp8(rows, 576, seed) for seed, rows in enumerate((576, 192, 192))
        )
        layer = build(
            None,
            None,
            cls=lambda k, n, **kw: QKVParallelLinear(
                576, 64, 9, 3, tp_rank=0, tp_size=1, **kw
            ),
        )
        for shard_id, (_, weight, scale) in zip("vqk", (v, q, k_)):
            load(layer, weight, scale, shard_id)
        self.assertEqual(layer.mxfp8_weights.unwritten(), [])
        process(layer)
        x = torch.randn(3, 576).bfloat16()
        weight = torch.cat([t[1].view(torch.uint8) for t in (q, k_, v)]).view(
            q[1].dtype
        )
        expected = reference_linear(x, weight, torch.cat([t[2] for t in (q, k_, v)]))
        torch.testing.assert_close(
            layer(x)[0], expected.bfloat16(), rtol=0.02, atol=0.05
        )

    def test_a_shard_written_later_lands_in_its_place(self):
        layer = build(
            [256, 512],
            256,
            cls=lambda k, n, **kw: MergedColumnParallelLinear(
                k, n, tp_rank=0, tp_size=1, **kw
            ),
        )
        gate, up, new_up = (
            random_mxfp8(n, 256, s)[1:] for s, n in enumerate((256, 512, 512))
        )
        load(layer, *gate, 0)
        load(layer, *up, 1)
        process(layer)
        load(layer, *new_up, 1)
        process(layer)
        layer.quant_method.restore_weights_before_loading(layer)
        self.assertTrue(same_bytes(layer.weight[:256], gate[0]))
        self.assertTrue(same_bytes(layer.weight[256:], new_up[0]))
        self.assertTrue(same_bytes(layer.weight_scale_inv[256:], new_up[1]))

    def test_loader_threads_write_parts_of_one_layer(self):
        """As DeepSeek's loader does; the first to write brings the layer back."""

        def slowly(*args):
            time.sleep(0.01)
            unswizzle_scale_(*args)

        self.enterContext(mock.patch.object(weights, "unswizzle_scale_", slowly))
        widths = [128] * 16
        layer = build(
            widths,
            512,
            cls=lambda k, n, **kw: MergedColumnParallelLinear(
                k, n, tp_rank=0, tp_size=1, **kw
            ),
        )
        for seed in range(3):
            _, weight, scale = random_mxfp8(sum(widths), 512, seed)
            parts = zip(weight.split(widths), scale.split(widths), range(len(widths)))
            with ThreadPoolExecutor(8) as pool:
                for part in [pool.submit(load, layer, *part) for part in parts]:
                    part.result()
            process(layer)
            layer.quant_method.restore_weights_before_loading(layer)
            self.assertTrue(same_bytes(layer.weight, weight))
            self.assertTrue(same_bytes(layer.weight_scale_inv, scale))
            process(layer)

    def test_tensor_parallel_shards(self):
        n, k = 512, 1024
        _, weight, scale = random_mxfp8(n, k)
        x = torch.randn(2, k).bfloat16()
        columns, rows = [], []
        for rank in range(2):
            layer = build(n, k, cls=ColumnParallelLinear, tp_rank=rank, tp_size=2)
            load(layer, weight, scale)
            process(layer)
            columns.append(layer(x)[0])
            layer = build(
                n,
                k,
                cls=RowParallelLinear,
                tp_rank=rank,
                tp_size=2,
                reduce_results=False,
            )
            load(layer, weight, scale)
            process(layer)
            rows.append(layer(x[:, rank * 512 :][:, :512])[0].double())
        expected = reference_linear(x, weight, scale)
        torch.testing.assert_close(
            torch.cat(columns, 1), expected.bfloat16(), rtol=0.02, atol=0.05
        )
        error = (sum(rows) - expected).norm() / expected.norm()
        self.assertLess(error, 4e-3, "two bf16 partial sums")

    def test_a_bf16_checkpoint_is_quantized_as_it_loads(self):
        layer = build(256, 512, serialized=False)
        weight, values, scale = random_mxfp8(256, 512)
        layer.weight.weight_loader(layer.weight, weight)
        self.assertTrue(same_bytes(layer.weight, values))
        self.assertTrue(same_bytes(layer.weight_scale_inv, scale))
        self.assertEqual(layer.mxfp8_weights.unwritten(), [])
        process(layer)
        update, values, scale = random_mxfp8(256, 512, seed=1)
        layer.weight.weight_loader(layer.weight, update)
        process(layer)
        layer.quant_method.restore_weights_before_loading(layer)
        self.assertTrue(same_bytes(layer.weight, values))
        self.assertTrue(same_bytes(layer.weight_scale_inv, scale))

    def test_mxfp8_quantizes_without_triton_kernels(self):
        """On a GPU that is said once, and tried once; also where it is for another Triton."""

        class OnAGpu(torch.Tensor):
            is_cuda = True

        plain = torch.randn(4, 64).bfloat16()
        on_a_gpu = plain.as_subclass(OnAGpu)
        self.addCleanup(fp8_utils._triton_downcast.cache_clear)
        other = types.ModuleType("triton_kernels")
        other.__getattr__ = mock.Mock(side_effect=RuntimeError("another Triton"))
        for found in None, other:
            fp8_utils._triton_downcast.cache_clear()
            with mock.patch.dict("sys.modules", {"triton_kernels": found}):
                with self.assertLogs(fp8_utils.logger, "WARNING") as logs:
                    for x in (plain, on_a_gpu, on_a_gpu):
                        values, scale = fp8_utils.mxfp8_group_quantize(x)
                        self.assertTrue(same_bytes(values, quantize(plain)[0]))
                        self.assertTrue(same_bytes(scale, quantize(plain)[1]))
            self.assertRegex("".join(logs.output), "triton_kernels cannot be imported")
            self.assertEqual(len(logs.output), 1)
            self.assertEqual(fp8_utils._triton_downcast.cache_info().misses, 1)


def kernel_form(layer) -> torch.Tensor:
    scale = layer.weight_scale_inv.data
    return kernel_scale(scale) if layer.mxfp8_weights.backend.is_flashinfer() else scale


class TestForward(MXFP8TestCase):
    def loaded(self, n=256, k=512, backend="flashinfer_trtllm", **kwargs):
        layer = build(n, k, backend, **kwargs)
        _, weight, scale = random_mxfp8(n, k)
        load(layer, weight, scale)
        process(layer)
        return layer, weight, scale

    def test_leading_dimensions_and_strides(self):
        layer, weight, scale = self.loaded()
        x = torch.randn(2, 512, 3).bfloat16().transpose(1, 2)
        expected = reference_linear(x.contiguous(), weight, scale).bfloat16()
        torch.testing.assert_close(layer(x)[0], expected, rtol=0.02, atol=0.05)
        self.assertEqual(layer(x[:, :0])[0].shape, (2, 0, 256))

    def test_quantized_input_with_either_scale_layout(self):
        for n, k in ((256, 512), (40, 64)):
            layer, weight, scale = self.loaded(n, k)
            x = torch.randn(5, k).bfloat16()
            values, x_scale = quantize(x)
            expected = reference_linear(x, weight, scale).bfloat16()
            method = layer.quant_method
            torch.testing.assert_close(
                method.apply(layer, (values, x_scale)), expected, rtol=0.02, atol=0.05
            )
        layer, weight, scale = self.loaded()
        values, x_scale = quantize(torch.randn(5, 512).bfloat16())
        plain = layer.quant_method.apply(layer, (values, x_scale))
        swizzled = layer.quant_method.apply(layer, (values, swizzle_scale(x_scale)))
        self.assertTrue(torch.equal(plain, swizzled))

    def test_fp16_model(self):
        layer, weight, scale = self.loaded(params_dtype=torch.float16)
        self.assertEqual(layer.mxfp8_weights.backend, CUTLASS)
        x = torch.randn(4, 512).half()
        output = layer(x)[0]
        self.assertEqual(output.dtype, torch.float16)
        torch.testing.assert_close(
            output, reference_linear(x, weight, scale).half(), rtol=0.02, atol=0.05
        )

    def test_torch_compile_sees_one_op(self):
        for n, k in ((256, 512), (160, 768)):  # the second has padding in its storage
            layer, _, _ = self.loaded(n, k)
            compiled = torch.compile(
                lambda x: layer(x)[0], dynamic=True, fullgraph=True, backend="aot_eager"
            )
            for m in (3, 130):
                x = torch.randn(m, k).bfloat16()
                self.assertTrue(torch.equal(compiled(x), layer(x)[0]))

    def test_the_op_has_a_right_fake(self):
        # Without padding: opcheck copies its inputs, and a copy carries only the view.
        layer, weight, scale = self.loaded(256, 512)
        x = torch.randn(9, 512).bfloat16()
        tensors = x, layer.weight, layer.weight_scale_inv, None
        # test_schema does arithmetic on its inputs, which fp8 has not.
        torch.library.opcheck(
            torch.ops.sglang.flashinfer_mxfp8_linear,
            (*tensors, torch.bfloat16, "trtllm", 8),
            test_utils="test_faketensor",
        )

    def test_the_two_halves_have_flashinfers_defaults(self):
        layer, weight, scale = self.loaded(256, 512, backend="flashinfer_cutlass")
        x = torch.randn(9, 512).bfloat16()
        a, a_scale = fp8_utils.flashinfer_mxfp8_quantize(x)
        output = fp8_utils.flashinfer_mm_mxfp8(
            a, layer.weight.t(), a_scale, kernel_form(layer), out_dtype=torch.bfloat16
        )
        self.assertTrue(torch.equal(output, layer(x)[0]))


class TestLoading(MXFP8TestCase):
    def test_a_scale_stored_as_e8m0_is_taken_by_its_bytes(self):
        _, weight, scale = random_mxfp8(256, 512)
        for cls in (ReplicatedLinear, ColumnParallelLinear, RowParallelLinear):
            with self.subTest(cls.__name__):
                kwargs = {} if cls is ReplicatedLinear else {"tp_rank": 0, "tp_size": 1}
                layer = build(256, 512, cls=cls, **kwargs)
                load(layer, weight, scale.view(torch.float8_e8m0fnu))
                self.assertTrue(same_bytes(layer.weight_scale_inv, scale))

    def test_weight_bytes_are_taken_as_they_are(self):
        layer = build(256, 512)
        _, weight, scale = random_mxfp8(256, 512)
        load(layer, weight.view(torch.uint8), scale)
        self.assertTrue(same_bytes(layer.weight, weight))

    def test_other_dtypes_are_refused_by_name(self):
        layer = build(256, 512)
        weight, values, scale = random_mxfp8(256, 512)
        with self.assertRaisesRegex(
            ValueError, "m.proj.weight holds .*got torch.bfloat16"
        ):
            load(layer, weight, scale)
        with self.assertRaisesRegex(ValueError, "m.proj.weight_scale_inv holds"):
            load(layer, values, scale.float())
        online = build(256, 512, serialized=False)
        with self.assertRaisesRegex(ValueError, "quantizes bf16, fp16 or fp32"):
            load(online, values, scale)
        with self.assertRaisesRegex(ValueError, "makes the scales itself"):
            online.weight_scale_inv.weight_loader(online.weight_scale_inv, scale)

    def load_model(self, *layers, tensors=(), model=None):
        """A model of these layers after its loader wrote `tensors`, as `named` gives them."""
        model = model or torch.nn.Module()
        model.layers = torch.nn.ModuleList(layers)

        def load_weights(weights):
            for name, tensor in weights:
                param = model.get_parameter(name)
                param.weight_loader(param, tensor)

        model.load_weights = load_weights
        loader = mock.Mock()
        loader.load_config = LoadConfig()
        loader.load_model = lambda **_: model.load_weights(tensors) or model
        return load_unchecked(loader)

    def test_a_layer_without_scales_stops_the_load_by_name(self):
        full, bare = build(256, 512), build(256, 512)
        _, weight, scale = random_mxfp8(256, 512)
        bare.weight.weight_loader(bare.weight, weight)
        with self.assertRaisesRegex(
            ValueError, "1 MXFP8 tensors: layers.1.weight_scale_inv"
        ):
            self.load_model(full, bare, tensors=named(0, weight, scale))

    def test_a_load_past_the_loaders_is_left_alone(self):
        layer = build(256, 512)
        self.load_model(layer, build(256, 512))
        self.assertEqual(layer.mxfp8_weights.form, Form.KERNEL)

    def test_raw_bytes_written_while_loading_are_checkpoint_bytes(self):
        """As dummy, sharded-state, remote key-value and NCCL loads do: process, then write."""
        _, weight, scale = random_mxfp8(160, 512)
        loader = mock.Mock()
        loader.load_config = LoadConfig()

        def load_model(**_):
            layer = build(160, 512)
            process(layer)
            layer.weight.data.copy_(weight)
            layer.weight_scale_inv.data.copy_(scale)
            return torch.nn.ModuleList([layer])

        loader.load_model = load_model
        with mock.patch.object(
            torch.nn.ModuleList, "load_weights", lambda *_: None, create=True
        ):
            (layer,) = load_unchecked(loader)
        x = torch.randn(3, 512).bfloat16()
        expected = reference_linear(x, weight, scale).bfloat16()
        torch.testing.assert_close(layer(x)[0], expected, rtol=0.02, atol=0.05)

    def test_the_log_says_what_runs_where_and_why(self):
        mlp = torch.nn.Module()
        mlp.down_proj, mlp.tiny = build(576, 1536), build(40, 576)
        with self.assertLogs("sglang", "INFO") as logs:
            self.load_model(mlp, build(960, 576))
        text = "\n".join(logs.output)
        self.assertIn(
            "1 on flashinfer_trtllm, 128x4 scales (down_proj [576, 1536]); ", text
        )
        self.assertRegex(
            text, r"flashinfer_cutlass \(1 \[960, 576\]\) since K = 576 is not"
        )
        self.assertRegex(text, "weight_only .tiny .*smaller than 128")
        self.assertIn("emulated in torch", text)

    def test_a_load_holds_its_own_layers_and_no_others(self):
        served = build(256, 512)
        with deferred_processing():
            loading = build(256, 512)
            with ThreadPoolExecutor() as pool:
                for layer in served, loading:
                    pool.submit(process, layer).result()
        self.assertEqual(served.mxfp8_weights.form, Form.KERNEL)
        self.assertNotEqual(loading.mxfp8_weights.form, Form.KERNEL)

    def test_a_custom_loader_may_use_threads(self):
        layers = build(256, 512), build(160, 512)
        model = self.load_model(*layers)
        tensors = [random_mxfp8(*layer.weight.shape, seed=3)[1:] for layer in layers]

        def custom_loader(model, _):
            with ThreadPoolExecutor() as pool:
                pool.submit(model.load_weights, named(0, *tensors[0])).result()
            layers[1].weight.data.copy_(tensors[1][0])
            layers[1].weight_scale_inv.data.copy_(tensors[1][1])

        as_mxfp8_raw_loader(custom_loader)(model, [])
        for layer, (weight, scale) in zip(layers, tensors):
            x = torch.randn(3, 512).bfloat16()
            expected = reference_linear(x, weight, scale).bfloat16()
            torch.testing.assert_close(layer(x)[0], expected, rtol=0.02, atol=0.05)

    def test_other_models_are_left_alone(self):
        model = torch.nn.Linear(2, 2)
        written = mock.Mock()
        as_mxfp8_raw_loader(written)(model, [])
        written.assert_called_once_with(model, [])

    def test_a_bf16_layer_multiplies_by_its_update(self):
        layer = build(40, 512)  # too small for any MXFP8 kernel
        model = self.load_model(layer)
        self.assertEqual(layer.mxfp8_weights.backend, WEIGHT_ONLY)
        for seed in range(2):
            _, weight, scale = random_mxfp8(40, 512, seed)
            model.load_weights(named(0, weight, scale))
            x = torch.randn(3, 512).bfloat16()
            expected = reference_linear(x, weight, scale, quantize_input=False)
            torch.testing.assert_close(
                layer(x)[0], expected.bfloat16(), rtol=0.02, atol=0.05
            )

    def test_a_parameter_that_is_not_alone_in_its_memory_is_refused(self):
        """Whatever put it there, before anything moves; and as soon as it is loaded."""

        def other_place(model, param):
            memory = torch.zeros(1 << 20, dtype=param.dtype)
            param.data = memory[64 : 64 + param.numel()].view(param.shape)

        def start_of_a_larger_memory(model, param):
            memory = torch.zeros(1 << 20, dtype=param.dtype)
            param.data = memory[: param.numel()].view(param.shape)

        def memory_of_the_same_size(model, param):
            param.data = param.data.clone()

        def elsewhere_in_its_own_memory(model, param):
            param.data = param.data[8:]

        def an_alias(model, param):
            model.w1 = param.data.view(-1)

        def another_module(model, param):
            model.tied = torch.nn.Module()
            model.tied.weight = param

        moves = (other_place, start_of_a_larger_memory, memory_of_the_same_size)
        moves += (elsewhere_in_its_own_memory, an_alias, another_module)
        _, *tensors = random_mxfp8(160, 512)
        for move in moves:
            for name in ("weight", "weight_scale_inv"):
                for backend in (*BACKENDS, "weight_only"):
                    with self.subTest(move.__name__, name=name, backend=backend):
                        n = 40 if backend == "weight_only" else 160
                        layers = [
                            build(n, 512, backend.replace("weight_only", "auto"))
                            for _ in "ab"
                        ]
                        model = torch.nn.Module()
                        model.layers = torch.nn.ModuleList(layers)
                        move(model, getattr(layers[1], name))
                        message = f"layers.1 .*its {name} was put into other memory"
                        with self.assertRaisesRegex(ValueError, message):
                            self.load_model(*layers, model=model)
                        for layer in layers:
                            self.assertNotEqual(layer.mxfp8_weights.form, Form.KERNEL)
                        if move in moves[:4]:
                            with self.assertRaisesRegex(ValueError, message):
                                load(layers[1], *(t[:n] for t in tensors))

    def test_a_layer_left_half_rearranged_stops_the_server(self):
        layers = build(256, 512), build(256, 512)
        tensors = [named(i, *random_mxfp8(256, 512, i)[1:]) for i in range(2)]
        model = self.load_model(*layers, tensors=tensors[0] + tensors[1])
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
        for again in tensors:
            with self.assertRaises(HalfMoved):
                model.load_weights(again)


if __name__ == "__main__":
    unittest.main()
