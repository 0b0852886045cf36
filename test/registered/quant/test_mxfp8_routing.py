"""Which kernel runs an MXFP8 linear layer: flags, machines, shapes, settings, tables."""

import contextlib
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.environ import envs
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import routing
from sglang.srt.layers.quantization.mxfp8.lifecycle import load_served_model
from sglang.srt.layers.quantization.mxfp8.routing import (
    CUTLASS,
    TRITON,
    TRTLLM,
    WEIGHT_ONLY,
    Mxfp8LinearOptions,
    resolve_mxfp8_linear_backend,
    select_mxfp8_linear_backend,
)
from sglang.srt.layers.quantization.mxfp8.scale_layout import (
    ANY_M,
    CONFIG_DIR,
    TunedLayer,
    config_file,
    flashinfer_version,
    tuned_layers,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    mxfp8_config,
    mxfp8_linear,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="default")

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
        with machine(emulation=True):
            for flag in "auto", "flashinfer_trtllm":
                options = resolve_mxfp8_linear_backend(flag)
                self.assertEqual(options.preferred, TRTLLM)
                # An explicit flag leaves a table no choice.
                self.assertEqual(options.is_auto, flag == "auto")
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
        tuned = {
            (256, 512): TunedLayer(0, CUTLASS.value),
            (256, 768): TunedLayer(0, TRITON.value),
        }
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

    def log(self, *shapes, **environment) -> str:
        """What a server of such layers logs at start."""
        with contextlib.ExitStack() as stack:
            for name, value in environment.items():
                stack.enter_context(getattr(envs, name).override(value))
            model = torch.nn.ModuleList(mxfp8_linear(*shape) for shape in shapes)
        model.load_weights = lambda _: None
        loader = mock.Mock(load_config=LoadConfig())
        loader.load_model.return_value = model
        # It has no model class, so there is no copy to check updates with.
        unchecked = envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True)
        with unchecked, self.assertLogs("sglang", "INFO") as logs:
            load_served_model(loader, None, None)
        return "\n".join(logs.output)

    def test_the_log_says_what_runs_where_and_why(self):
        two = (256, 512), (384, 512)
        forced = "m.proj = flashinfer_cutlass, nothing=weight_only"
        for environment, shapes, *lines in (
            (
                {},
                two,
                r"MXFP8 linear layers: 2 on flashinfer_trtllm, 8x4 scales up to M = 128 "
                r"\(0 \[256, 512\], 1 \[384, 512\]\)$",
                "emulated in torch",
            ),
            (
                {},
                ((576, 1536), (960, 576), (40, 576)),
                r"1 on flashinfer_trtllm, 128x4 scales \(0 \[576, 1536\]\); ",
                r"flashinfer_cutlass \(1 \[960, 576\]\) since K = 576 is not",
                r"weight_only \(2 .*smaller than 128",
            ),
            (
                dict(SGLANG_MXFP8_LINEAR_BACKEND=forced),
                two,
                r"2 on flashinfer_cutlass .* since SGLANG_MXFP8_LINEAR_BACKEND has "
                "m.proj=flashinfer_cutlass",
                "no MXFP8 layer of this model matches nothing",
            ),
            (
                dict(SGLANG_MXFP8_LINEAR_BACKEND="proj=weight_only"),
                two,
                r"2 on weight_only \(",
            ),
            (
                dict(SGLANG_MXFP8_TRTLLM_SF_LAYOUT="8x4"),
                two,
                r"2 on flashinfer_trtllm, 8x4 scales \(",
            ),
            (
                dict(SGLANG_MXFP8_TRTLLM_SF_LAYOUT="128x4"),
                two,
                r"2 on flashinfer_trtllm, 128x4 scales \(",
            ),
        ):
            with self.subTest(environment, shapes=shapes):
                log = self.log(*shapes, **environment)
                for line in lines:
                    self.assertRegex(log, f"(?m){line}")
                self.assertEqual("matches" in log, "nothing" in lines[-1])

    def test_a_k_that_is_no_mxfp8_is_refused_at_load(self):
        for n, k in (256, 144), (256, 400), (40, 72):
            with self.assertRaisesRegex(
                ValueError, rf"m.proj \[{n}, {k}\].*K % 32.*modules_to_not_convert"
            ):
                mxfp8_linear(n, k)

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
    def read(self, text: str):
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, config_file("Some GPU")).write_text(text)
            return tuned_layers(directory, "Some GPU", "0.6.7")

    def table(self, **changes) -> str:
        shape = {"N=2560,K=8192": {"max_m_8x4": 64, "backend": "flashinfer_cutlass"}}
        table = dict(device_name="Some GPU", flashinfer="0.6.7", layers=shape)
        return json.dumps({**table, **changes})

    def test_a_table_is_read(self):
        self.assertEqual(
            self.read(self.table()), {(2560, 8192): TunedLayer(64, CUTLASS.value)}
        )
        self.assertEqual(tuned_layers(CONFIG_DIR, "No such GPU", "0.6.7"), {})
        self.assertRegex(CONFIG_DIR, "/sglang/srt/layers/quantization/configs/mxfp8$")
        with self.assertLogs("sglang", "WARNING") as logs:
            self.assertEqual(tuned_layers("/no/such", "Some GPU", "0.6.7"), {})
        self.assertIn("SGLANG_MXFP8_CONFIG_DIR has no /no/such", logs.output[0])

    def test_a_wrong_or_stale_one_is_ignored_with_a_warning(self):
        layers = (
            ("2560x8192", {"max_m_8x4": 1}, "is not N="),
            ("N=1,K=2", {"max_m_8x4": True}, "max_m_8x4 is True"),
            ("N=1,K=2", {"max_m_8x4": -1}, "max_m_8x4 is -1"),
            ("N=1,K=2", {"m": 1}, "unexpected keyword"),
            ("N=1,K=2", {"max_m_8x4": 1, "backend": "x"}, "backend is 'x"),
            ("N=1,K=2", {"max_m_8x4": 1, "backend": "weight_only"}, "backend is 'w"),
        )
        for text, reason in (
            ("{", "Expecting"),
            ("[]", "no attribute"),
            ("{}", "device_name"),
            (self.table(device_name="Another"), "for device_name 'Another'"),
            (self.table(flashinfer="0.6.6"), "for flashinfer '0.6.6', this is '0.6.7'"),
            (self.table(rehearsal=True), "rehearsal"),
            *((self.table(layers={shape: row}), why) for shape, row, why in layers),
            ("[" * 100_000, "recursion"),
        ):
            with self.subTest(reason), self.assertLogs("sglang", "WARNING") as logs:
                self.assertEqual(self.read(text), {})
            self.assertRegex(
                logs.output[0], f"Ignored .*{reason}.*tune_mxfp8_layout.py"
            )

    def test_a_layer_uses_the_table_of_this_machine(self):
        text = self.table(
            device_name="cpu",
            flashinfer=flashinfer_version(),
            layers={"N=256,K=512": {"max_m_8x4": 3}},
        )
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, config_file("cpu")).write_text(text)
            with envs.SGLANG_MXFP8_CONFIG_DIR.override(directory):
                layer = mxfp8_linear(256, 512)
        self.assertEqual(layer.mxfp8_weights.choice.max_m_8x4, 3)


if __name__ == "__main__":
    unittest.main()
