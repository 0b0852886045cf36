"""Which kernel runs an MXFP8 linear layer, and that each one computes it at the edges."""

import contextlib
import functools
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import flashinfer
import torch
from flashinfer.autotuner import AutoTuner, autotune
from torch._dynamo.testing import CompileCounterWithBackend

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.environ import envs
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import emulation, routing
from sglang.srt.layers.quantization.mxfp8.layout import swizzle_scale
from sglang.srt.layers.quantization.mxfp8.lifecycle import load_served_model
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize, quantize
from sglang.srt.layers.quantization.mxfp8.routing import (
    ANY_M,
    CONFIG_DIR,
    CUTLASS,
    TRITON,
    TRTLLM,
    WEIGHT_ONLY,
    Mxfp8LinearOptions,
    TunedLayer,
    config_file,
    flashinfer_version,
    resolve_mxfp8_linear_backend,
    select_mxfp8_linear_backend,
    tuned_layers,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    init_single_process_parallel_state,
    mxfp8_config,
    random_mxfp8,
    reference_linear,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")

ALL = (TRTLLM, CUTLASS, TRITON)


@contextlib.contextmanager
def machine(capability=None, flashinfer="0.6.7.post3", emulation=False):
    """Resolve as on a GPU of this compute capability, or without one."""
    with mock.patch.multiple(
        routing,
        is_cuda=lambda: capability is not None,
        get_device_capability=lambda: capability,
        is_sm100_supported=lambda: capability is not None and capability[0] == 10,
        is_flashinfer_available=lambda: capability is not None,
        flashinfer_version=lambda: flashinfer,
    ), mock.patch("torch.cuda.get_device_name", lambda *_: "Some GPU"):
        with envs.SGLANG_MXFP8_EMULATION.override(emulation):
            yield


def load_unchecked(loader):
    """A model of no model class, so that there is no copy to check updates with."""
    with envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True):
        return load_served_model(loader, None, None)


class TestResolve(CustomTestCase):
    def test_auto_is_the_first_that_runs(self):
        for capability, found, expected in (
            ((10, 0), "0.6.7.post3", TRTLLM),
            ((10, 3), "0.6.14", TRTLLM),
            ((11, 0), "0.6.7", CUTLASS),
            ((10, 0), "0.6.6", TRITON),
            ((10, 0), None, TRITON),
            ((8, 0), "0.6.7", WEIGHT_ONLY),
            ((9, 0), None, WEIGHT_ONLY),
            ((12, 0), "0.6.7", WEIGHT_ONLY),
            (None, "0.6.7", WEIGHT_ONLY),  # in plain torch
        ):
            with self.subTest(capability=capability, flashinfer=found):
                with machine(capability, found):
                    options = resolve_mxfp8_linear_backend("auto")
                    self.assertEqual(options.preferred, expected)
                    self.assertTrue(options.is_auto)
        with machine(emulation=True):
            self.assertEqual(resolve_mxfp8_linear_backend("auto").preferred, TRTLLM)
        with machine((9, 0)):
            self.assertEqual(
                resolve_mxfp8_linear_backend("triton").preferred, WEIGHT_ONLY
            )
        # A GPU that has a kernel needs no emulation.
        with machine((10, 0), "0.6.6", emulation=True):
            self.assertEqual(resolve_mxfp8_linear_backend("auto").preferred, TRITON)

    def test_auto_means_that_for_mxfp8_only(self):
        with machine((10, 0)), fp8_gemm_backend("auto", emulation=False):
            options = mxfp8_config().mxfp8_linear_options
            self.assertEqual(options.preferred, TRTLLM)
            self.assertTrue(fp8_utils.get_fp8_gemm_runner_backend().is_auto())

    def test_what_cannot_run_is_refused_by_what_is_missing(self):
        for flag, capability, found, missing in (
            ("flashinfer_trtllm", None, "0.6.7", "without CUDA.* SM100 or SM103 GPU"),
            ("flashinfer_trtllm", (9, 0), "0.6.7", "Some GPU.* SM100 or SM103 GPU"),
            ("flashinfer_trtllm", (11, 0), "0.6.7", "SM100 or SM103 GPU"),
            ("flashinfer_cutlass", (12, 0), "0.6.7", "SM100 or SM103 or SM110 GPU"),
            ("flashinfer_cutlass", (10, 0), "0.6.6", "0.6.7 .found 0.6.6."),
            ("flashinfer_trtllm", (10, 0), None, "found None"),
            ("triton", None, "0.6.7", "SM100 or SM103 GPU"),
            ("triton", (7, 5), "0.6.7", "SM80 or later GPU"),
            ("auto", (7, 5), "0.6.7", "SM80 or later GPU"),
        ):
            with self.subTest(flag=flag, capability=capability, flashinfer=found):
                with machine(capability, found):
                    with self.assertRaisesRegex(
                        RuntimeError, f"={flag} .*{missing}.*SGLANG_MXFP8_EMULATION=1"
                    ):
                        resolve_mxfp8_linear_backend(flag)

    def test_a_flag_without_mxfp8_linear_is_refused(self):
        with machine((10, 0)):
            with self.assertRaisesRegex(ValueError, "deep_gemm has no MXFP8 linear"):
                resolve_mxfp8_linear_backend("deep_gemm")

    def test_block_fp8_refuses_flashinfer_cutlass(self):
        with fp8_gemm_backend("flashinfer_cutlass"):
            with self.assertRaisesRegex(ValueError, "MXFP8 linear layers only"):
                fp8_utils.dispatch_w8a8_block_fp8_linear()

    def test_settings_that_mean_nothing_stop_the_start(self):
        for variable, value, message in (
            (envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT, "4x8", "'4x8' is none of auto, 8x4"),
            (envs.SGLANG_MXFP8_LINEAR_BACKEND, "down_proj", "not PATTERN=BACKEND"),
            (
                envs.SGLANG_MXFP8_LINEAR_BACKEND,
                "a=marlin",
                "flashinfer_cutlass, weight_only",
            ),
            (envs.SGLANG_MXFP8_LINEAR_BACKEND, "a=bf16", "weight_only computes"),
            (envs.SGLANG_MXFP8_LINEAR_BACKEND, "a=triton", "that run here"),
        ):
            with self.subTest(value), machine(emulation=True), variable.override(value):
                with self.assertRaisesRegex(ValueError, message):
                    resolve_mxfp8_linear_backend("auto")


class TestSelect(CustomTestCase):
    def test_each_shape_gets_a_backend_that_takes_it(self):
        for preferred, n, k, dtype, expected, reason in (
            (TRTLLM, 576, 1536, torch.bfloat16, TRTLLM, ""),
            (TRTLLM, 960, 576, torch.bfloat16, CUTLASS, "K = 576 is not a multiple"),
            (TRTLLM, 256, 256, torch.float16, CUTLASS, "bf16 only"),
            (TRTLLM, 96, 256, torch.bfloat16, WEIGHT_ONLY, "smaller than 128"),
            (
                TRTLLM,
                688,
                4096,
                torch.bfloat16,
                WEIGHT_ONLY,
                "N = 688 is not a multiple",
            ),
            (TRTLLM, 256, 256, torch.float32, TRITON, "cannot be quantized"),
            (CUTLASS, 256, 256, torch.bfloat16, CUTLASS, ""),
            (CUTLASS, 256, 96, torch.bfloat16, WEIGHT_ONLY, "smaller than 128"),
            (TRITON, 960, 576, torch.bfloat16, WEIGHT_ONLY, "(triton)"),
        ):
            with self.subTest(preferred=preferred, n=n, k=k, dtype=dtype):
                options = Mxfp8LinearOptions(preferred, ALL)
                choice = select_mxfp8_linear_backend(options, n, k, dtype)
                self.assertEqual(choice.backend, expected)
                self.assertIn(reason, choice.reason)
                self.assertEqual(bool(choice.reason), expected != preferred)

    def test_only_what_is_available_stands_in(self):
        options = Mxfp8LinearOptions(TRTLLM, (TRTLLM,))
        choice = select_mxfp8_linear_backend(options, 960, 576, torch.bfloat16)
        self.assertEqual(choice.backend, WEIGHT_ONLY)
        self.assertNotIn("triton", choice.reason)

    def test_a_pattern_forces_single_layers(self):
        forced = (
            ("down_proj", CUTLASS),
            ("layers.0.mlp.*", WEIGHT_ONLY),
            ("o_proj", TRTLLM),
        )
        options = Mxfp8LinearOptions(TRTLLM, ALL, forced=forced)

        def select(prefix, k=512):
            args = 256, k, torch.bfloat16, f"model.layers.{prefix}"
            return select_mxfp8_linear_backend(options, *args)

        self.assertEqual(select("0.mlp.down_proj").backend, CUTLASS)  # the first wins
        self.assertIn("down_proj=flashinfer_cutlass", select("1.mlp.down_proj").reason)
        self.assertEqual(select("0.mlp.gate_up_proj").backend, WEIGHT_ONLY)
        self.assertEqual(select("10.mlp.gate_up_proj").backend, TRTLLM)
        self.assertEqual(select("0.self_attn.o_proj").reason, "")
        self.assertEqual(select("0.self_attn.qkv_proj").backend, TRTLLM)
        with self.assertRaisesRegex(
            ValueError,
            "o_proj=flashinfer_trtllm, but model.layers.0.x.o_proj .*K = 288",
        ):
            select("0.x.o_proj", k=288)
        self.assertEqual(
            options.unmatched_patterns(["model.layers.0.mlp.down_proj"]), ["o_proj"]
        )

    def test_the_layout_of_the_activation_scale(self):
        def up_to(n, k, preferred=TRTLLM, **kwargs):
            options = Mxfp8LinearOptions(preferred, ALL, **kwargs)
            args = n, k, torch.bfloat16
            return select_mxfp8_linear_backend(options, *args).max_m_8x4

        tuned = {(2560, 8192): TunedLayer(16), (8192, 2560): TunedLayer(4)}
        for n, k, default, with_table in (
            # The published crossovers.
            (2304, 8192, 128, 128),
            (2560, 8192, 128, 16),
            (8192, 2560, 0, 4),
            (8192, 4096, 0, 0),
            (8832, 8192, 0, 0),
        ):
            self.assertEqual(up_to(n, k), default)
            self.assertEqual(up_to(n, k, tuned=tuned), with_table)
            self.assertEqual(up_to(n, k, tuned=tuned, sf_layout="8x4"), ANY_M)
            self.assertEqual(up_to(n, k, tuned=tuned, sf_layout="128x4"), 0)
            self.assertEqual(up_to(n, k, CUTLASS, sf_layout="8x4"), 0)
        # FlashInfer refuses 8x4 there, whoever asks for it.
        tuned = {(2112, 7168): TunedLayer(64)}
        for settings in {}, {"sf_layout": "8x4"}, {"tuned": tuned}:
            self.assertEqual(up_to(2112, 7168, **settings), 0)

    def test_a_table_chooses_the_backend_under_auto_only(self):
        tuned = {(256, 512): TunedLayer(0, CUTLASS), (256, 768): TunedLayer(0, TRITON)}
        for is_auto, k, expected in (
            (True, 512, CUTLASS),
            (False, 512, TRTLLM),
            (True, 768, TRTLLM),  # Triton does not run on this machine
        ):
            options = Mxfp8LinearOptions(TRTLLM, ALL[:2], is_auto, tuned=tuned)
            choice = select_mxfp8_linear_backend(options, 256, k, torch.bfloat16)
            self.assertEqual(choice.backend, expected)
            self.assertEqual("tuned" in choice.reason, expected == CUTLASS)


class TestSettings(CustomTestCase):
    """Environment variables, through the real linear method and the summary line."""

    def model(self, backend="flashinfer_trtllm", **environment):
        with contextlib.ExitStack() as stack:
            for name, value in environment.items():
                stack.enter_context(getattr(envs, name).override(value))
            layers = [build(*shape, backend) for shape in ((256, 512), (384, 512))]
        model = torch.nn.ModuleList(layers)
        model.load_weights = lambda _: None
        loader = mock.Mock(load_config=LoadConfig())
        loader.load_model.return_value = model
        with self.assertLogs("sglang", "INFO") as logs:
            load_unchecked(loader)
        return [layer.mxfp8_weights.choice for layer in layers], "\n".join(logs.output)

    def test_the_defaults(self):
        (first, second), log = self.model()
        self.assertEqual(first, second)
        self.assertIn(
            "MXFP8 linear layers: 2 on flashinfer_trtllm, 8x4 scales up to M = 128 "
            "(0 [256, 512], 1 [384, 512])",
            log,
        )
        self.assertNotIn("matches", log)

    def test_a_forced_backend(self):
        for backend in "flashinfer_cutlass", "weight_only":
            pattern = f"m.proj = {backend}, nothing=weight_only"
            choices, log = self.model(SGLANG_MXFP8_LINEAR_BACKEND=pattern)
            self.assertEqual({c.backend.value for c in choices}, {backend})
            self.assertIn(f"2 on {backend} ", log)
            self.assertIn(
                f"since SGLANG_MXFP8_LINEAR_BACKEND has m.proj={backend}", log
            )
            self.assertRegex(log, "no MXFP8 layer of this model matches nothing")

    def test_a_forced_layout(self):
        choices, log = self.model(SGLANG_MXFP8_TRTLLM_SF_LAYOUT="8x4")
        self.assertEqual({c.max_m_8x4 for c in choices}, {ANY_M})
        self.assertIn("flashinfer_trtllm, 8x4 scales (", log)
        choices, log = self.model(SGLANG_MXFP8_TRTLLM_SF_LAYOUT="128x4")
        self.assertEqual({c.max_m_8x4 for c in choices}, {0})
        self.assertIn("flashinfer_trtllm, 128x4 scales (", log)

    def test_an_explicit_flag_leaves_a_table_no_choice(self):
        for flag in "flashinfer_trtllm", "flashinfer_cutlass", "auto":
            with machine(emulation=True):
                options = resolve_mxfp8_linear_backend(flag)
            self.assertEqual(options.is_auto, flag == "auto")

    def test_a_k_that_is_no_mxfp8_is_refused_at_load(self):
        for n, k in (256, 144), (256, 400), (40, 72):
            with self.assertRaisesRegex(
                ValueError, rf"m.proj \[{n}, {k}\].*K % 32.*modules_to_not_convert"
            ):
                build(n, k, "flashinfer_trtllm")

    def test_flashinfer_switched_off_is_missing(self):
        with machine((10, 0)), mock.patch.object(
            routing, "is_flashinfer_available", lambda: False
        ):
            with self.assertRaisesRegex(RuntimeError, "IS_FLASHINFER_AVAILABLE=true"):
                resolve_mxfp8_linear_backend("flashinfer_trtllm")

    def test_the_capability_that_mxfp8_asks_for(self):
        for emulation, capability in (False, 80), (True, 0):
            with envs.SGLANG_MXFP8_EMULATION.override(emulation):
                self.assertEqual(mxfp8_config().get_min_capability(), capability)


class TestTable(CustomTestCase):
    LAYERS = {"N=2560,K=8192": {"max_m_8x4": 64, "backend": "flashinfer_cutlass"}}

    def read(self, text: str):
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, config_file("Some GPU")).write_text(text)
            return tuned_layers(directory, "Some GPU", "0.6.7")

    def table(self, **changes) -> str:
        table = {
            "device_name": "Some GPU",
            "flashinfer": "0.6.7",
            "layers": self.LAYERS,
        }
        return json.dumps({**table, **changes})

    def test_a_table_is_read(self):
        self.assertEqual(
            self.read(self.table()), {(2560, 8192): TunedLayer(64, CUTLASS)}
        )
        self.assertEqual(tuned_layers(CONFIG_DIR, "No such GPU", "0.6.7"), {})
        self.assertRegex(CONFIG_DIR, "/sglang/srt/layers/quantization/configs/mxfp8$")
        with self.assertLogs("sglang", "WARNING") as logs:
            self.assertEqual(tuned_layers("/no/such", "Some GPU", "0.6.7"), {})
        self.assertIn("SGLANG_MXFP8_CONFIG_DIR has no /no/such", logs.output[0])

    def test_a_wrong_or_stale_one_is_ignored_with_a_warning(self):
        for text, reason in (
            ("{", "Expecting"),
            ("[]", "no attribute"),
            ("{}", "device_name"),
            (self.table(device_name="Another"), "for device_name 'Another'"),
            (self.table(flashinfer="0.6.6"), "for flashinfer '0.6.6', this is '0.6.7'"),
            (self.table(rehearsal=True), "rehearsal"),
            (self.table(layers={"2560x8192": {"max_m_8x4": 1}}), "is not N="),
            (self.table(layers={"N=1,K=2": {"max_m_8x4": True}}), "max_m_8x4 is True"),
            (self.table(layers={"N=1,K=2": {"max_m_8x4": -1}}), "max_m_8x4 is -1"),
            (self.table(layers={"N=1,K=2": {"m": 1}}), "unexpected keyword"),
            (
                self.table(layers={"N=1,K=2": {"max_m_8x4": 1, "backend": "x"}}),
                "not a valid",
            ),
            (
                self.table(
                    layers={"N=1,K=2": {"max_m_8x4": 1, "backend": "weight_only"}}
                ),
                "backend is 'weight_only'",
            ),
            ("[" * 100_000, "recursion"),
        ):
            with self.subTest(reason), self.assertLogs("sglang", "WARNING") as logs:
                self.assertEqual(self.read(text), {})
            self.assertRegex(
                logs.output[0], f"Ignored .*{reason}.*tune_mxfp8_layout.py"
            )

    def test_a_layer_uses_the_table_of_this_machine(self):
        layers = {"N=256,K=512": {"max_m_8x4": 3}}
        text = self.table(
            device_name="cpu", flashinfer=flashinfer_version(), layers=layers
        )
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, config_file("cpu")).write_text(text)
            with envs.SGLANG_MXFP8_CONFIG_DIR.override(directory):
                layer = build(256, 512, "flashinfer_trtllm")
        self.assertEqual(layer.mxfp8_weights.choice.max_m_8x4, 3)


if __name__ == "__main__":
    unittest.main()
