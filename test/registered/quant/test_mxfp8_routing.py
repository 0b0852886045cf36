"""Which kernel runs an MXFP8 linear layer: flags, machines, shapes, settings, tables."""

import contextlib
import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.mxfp8 import routing, scale_layout
from sglang.srt.layers.quantization.mxfp8.routing import (
    CUTLASS,
    TRITON,
    TRTLLM,
    WEIGHT_ONLY,
    Mxfp8LinearOptions,
    resolve_mxfp8_linear_backend,
    select_mxfp8_linear_backend,
)
from sglang.srt.layers.quantization.mxfp8.scale_layout import TunedLayer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    as_served,
    fp8_gemm_backend,
    mxfp8_config,
    mxfp8_linear,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="default")

ALL = (TRTLLM, CUTLASS, TRITON)
BF16 = torch.bfloat16


@contextlib.contextmanager
def machine(capability=None, found="0.6.7.post3", emulation=False, switched_on=True):
    """Resolve as on a GPU of this compute capability, or without one, with the
    FlashInfer that is found."""
    has_gpu = capability is not None
    with mock.patch.multiple(
        routing,
        is_cuda=lambda: has_gpu,
        get_device_capability=lambda: capability,
        is_sm100_supported=lambda: has_gpu and capability[0] == 10,
        is_flashinfer_available=lambda: has_gpu and switched_on,
        flashinfer_version=lambda: found,
    ), mock.patch("torch.cuda.get_device_name", lambda *_: "Some GPU"):
        with envs.SGLANG_MXFP8_EMULATION.override(emulation):
            yield


class TestResolve(CustomTestCase):
    def test_a_flag_becomes_the_first_backend_that_runs(self):
        """An explicit flag leaves a table no choice."""
        for flag, capability, found, emulation, expected in (
            ("auto", (10, 0), "0.6.7.post3", False, TRTLLM),
            ("auto", (10, 3), "0.6.14", False, TRTLLM),
            ("auto", (11, 0), "0.6.7", False, CUTLASS),
            ("auto", (10, 0), "0.6.6", False, TRITON),
            ("auto", (10, 0), None, False, TRITON),
            ("auto", (8, 0), "0.6.7", False, WEIGHT_ONLY),
            ("auto", (9, 0), None, False, WEIGHT_ONLY),
            ("auto", (12, 0), "0.6.7", False, WEIGHT_ONLY),
            ("auto", None, "0.6.7", False, WEIGHT_ONLY),  # in plain torch
            ("auto", None, "0.6.7", True, TRTLLM),
            ("flashinfer_trtllm", None, "0.6.7", True, TRTLLM),
            ("triton", (9, 0), "0.6.7", False, WEIGHT_ONLY),
            # A GPU that has a kernel needs no emulation.
            ("auto", (10, 0), "0.6.6", True, TRITON),
        ):
            with self.subTest(flag, capability=capability, flashinfer=found):
                with machine(capability, found, emulation):
                    options = resolve_mxfp8_linear_backend(flag)
                self.assertEqual(options.preferred, expected)
                self.assertEqual(options.is_auto, flag == "auto")

    def test_block_fp8_is_refused_a_backend_of_mxfp8_alone(self):
        with fp8_gemm_backend("flashinfer_cutlass"):
            with self.assertRaisesRegex(ValueError, "MXFP8 linear layers only"):
                fp8_utils.dispatch_w8a8_block_fp8_linear()

    def test_what_cannot_run_is_refused_by_what_is_missing(self):
        off = dict(switched_on=False)
        for flag, capability, found, missing, *how in (
            ("flashinfer_trtllm", None, "0.6.7", "without CUDA.* SM100 or SM103 GPU"),
            ("flashinfer_trtllm", (9, 0), "0.6.7", "Some GPU.* SM100 or SM103 GPU"),
            ("flashinfer_trtllm", (11, 0), "0.6.7", "SM100 or SM103 GPU"),
            ("flashinfer_cutlass", (12, 0), "0.6.7", "SM100 or SM103 or SM110 GPU"),
            ("flashinfer_cutlass", (10, 0), "0.6.6", "0.6.7 .found 0.6.6."),
            ("flashinfer_trtllm", (10, 0), None, "found None"),
            ("flashinfer_trtllm", (10, 0), "0.6.7", "R_AVAILABLE=true", off),
            ("triton", None, "0.6.7", "SM100 or SM103 GPU"),
            ("triton", (7, 5), "0.6.7", "SM80 or later GPU"),
            ("auto", (7, 5), "0.6.7", "SM80 or later GPU"),
        ):
            message = f"={flag} .*{missing}.*SGLANG_MXFP8_EMULATION=1"
            with self.subTest(flag=flag, capability=capability, flashinfer=found):
                with machine(capability, found, **dict(*how)):
                    with self.assertRaisesRegex(RuntimeError, message):
                        resolve_mxfp8_linear_backend(flag)

    def test_settings_that_mean_nothing_stop_the_start(self):
        layout = envs.SGLANG_MXFP8_TRTLLM_SF_LAYOUT
        backend = envs.SGLANG_MXFP8_LINEAR_BACKEND
        for flag, variable, value, message in (
            ("auto", layout, "4x8", "'4x8' is none of auto, 8x4"),
            ("auto", backend, "down_proj", "not PATTERN=BACKEND"),
            ("auto", backend, "a=marlin", "flashinfer_cutlass, weight_only"),
            ("auto", backend, "a=bf16", "weight_only computes"),
            ("auto", backend, "a=triton", "that run here"),
            ("deep_gemm", backend, "", "deep_gemm has no MXFP8 linear"),
        ):
            with self.subTest(value), machine(emulation=True), variable.override(value):
                with self.assertRaisesRegex(ValueError, message):
                    resolve_mxfp8_linear_backend(flag)

    def test_the_capability_that_mxfp8_asks_for(self):
        for emulation, capability in (False, 80), (True, 0):
            with envs.SGLANG_MXFP8_EMULATION.override(emulation):
                self.assertEqual(mxfp8_config().get_min_capability(), capability)


def select(n, k, dtype=BF16, prefix="", preferred=TRTLLM, available=ALL, **settings):
    options = Mxfp8LinearOptions(preferred, available, **settings)
    return select_mxfp8_linear_backend(options, n, k, dtype, prefix)


class TestSelect(CustomTestCase):
    def test_each_shape_gets_a_backend_that_takes_it(self):
        for preferred, n, k, dtype, expected, reason in (
            (TRTLLM, 576, 1536, BF16, TRTLLM, ""),
            (TRTLLM, 960, 576, BF16, CUTLASS, "K = 576 is not a multiple"),
            (TRTLLM, 256, 256, torch.float16, CUTLASS, "bf16 only"),
            (TRTLLM, 96, 256, BF16, WEIGHT_ONLY, "smaller than 128"),
            (TRTLLM, 688, 4096, BF16, WEIGHT_ONLY, "N = 688 is not a multiple"),
            (TRTLLM, 256, 256, torch.float32, TRITON, "cannot be quantized"),
            (CUTLASS, 256, 256, BF16, CUTLASS, ""),
            (CUTLASS, 256, 96, BF16, WEIGHT_ONLY, "smaller than 128"),
            (TRITON, 960, 576, BF16, WEIGHT_ONLY, "(triton)"),
        ):
            with self.subTest(preferred=preferred, n=n, k=k, dtype=dtype):
                choice = select(n, k, dtype, preferred=preferred)
                self.assertEqual(choice.backend, expected)
                self.assertIn(reason, choice.reason)
                self.assertEqual(bool(choice.reason), expected != preferred)
        # Only what is available stands in.
        choice = select(960, 576, available=(TRTLLM,))
        self.assertEqual(choice.backend, WEIGHT_ONLY)
        self.assertNotIn("triton", choice.reason)

    def test_a_pattern_forces_single_layers(self):
        forced = (
            ("down_proj", CUTLASS),
            ("layers.0.mlp.*", WEIGHT_ONLY),
            ("o_proj", TRTLLM),
        )
        for layer, expected, reason in (
            ("0.mlp.down_proj", CUTLASS, "down_proj=flashinfer_cutlass"),  # the first
            ("1.mlp.down_proj", CUTLASS, "down_proj=flashinfer_cutlass"),
            ("0.mlp.gate_up_proj", WEIGHT_ONLY, "mlp.*=weight_only"),
            ("10.mlp.gate_up_proj", TRTLLM, ""),
            ("0.self_attn.o_proj", TRTLLM, ""),
            ("0.self_attn.qkv_proj", TRTLLM, ""),
        ):
            choice = select(256, 512, prefix=f"model.layers.{layer}", forced=forced)
            self.assertEqual(choice.backend, expected, layer)
            self.assertIn(reason, choice.reason)
            self.assertEqual(bool(choice.reason), bool(reason))
        reason = "o_proj=flashinfer_trtllm, but model.layers.0.x.o_proj .*K = 288"
        with self.assertRaisesRegex(ValueError, reason):
            select(256, 288, prefix="model.layers.0.x.o_proj", forced=forced)
        options = Mxfp8LinearOptions(TRTLLM, ALL, forced=forced)
        unmatched = options.unmatched_patterns(["model.layers.0.mlp.down_proj"])
        self.assertEqual(unmatched, ["o_proj"])

    def test_the_layout_of_the_activation_scale(self):
        tuned = {(2560, 8192): TunedLayer(16), (8192, 2560): TunedLayer(4)}
        forced = dict(tuned=tuned, sf_layout="8x4")
        for n, k, default, with_table in (
            # The published crossovers.
            (2304, 8192, 128, 128),
            (2560, 8192, 128, 16),
            (8192, 2560, 0, 4),
            (8192, 4096, 0, 0),
            (8832, 8192, 0, 0),
        ):
            for expected, settings in (
                (default, {}),
                (with_table, dict(tuned=tuned)),
                (scale_layout.ANY_M, forced),
                (0, {**forced, "sf_layout": "128x4"}),
                (0, dict(preferred=CUTLASS, sf_layout="8x4")),
            ):
                self.assertEqual(select(n, k, **settings).max_m_8x4, expected)
        # FlashInfer refuses 8x4 there, whoever asks for it.
        tuned = {(2112, 7168): TunedLayer(64)}
        for settings in {}, {"sf_layout": "8x4"}, {"tuned": tuned}:
            self.assertEqual(select(2112, 7168, **settings).max_m_8x4, 0)

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
            options = dict(available=ALL[:2], is_auto=is_auto, tuned=tuned)
            choice = select(256, k, **options)
            self.assertEqual(choice.backend, expected)
            self.assertEqual("tuned" in choice.reason, expected == CUTLASS)


class TestSettings(CustomTestCase):
    """Environment variables, through the real linear method and the summary line."""

    def log(self, shapes, **environment) -> str:
        """What a server of such layers logs at start; variables without SGLANG_MXFP8_."""
        with contextlib.ExitStack() as stack:
            for name, value in environment.items():
                variable = getattr(envs, f"SGLANG_MXFP8_{name}")
                stack.enter_context(variable.override(value))
            model = torch.nn.ModuleList(mxfp8_linear(*shape) for shape in shapes)
        model.load_weights = lambda _: None
        with self.assertLogs("sglang", "INFO") as logs:
            as_served(model)
        return "\n".join(logs.output)

    def test_the_log_says_what_runs_where_and_why(self):
        two, trtllm = ((256, 512), (384, 512)), "flashinfer_trtllm"
        three = (576, 1536), (960, 576), (40, 576)
        forced = "m.proj = flashinfer_cutlass, nothing=weight_only"
        listed = r"\(0 \[256, 512\], 1 \[384, 512\]\)$"
        why = "SGLANG_MXFP8_LINEAR_BACKEND has m.proj=flashinfer_cutlass"
        for shapes, environment, *lines in (
            (
                two,
                {},
                f"MXFP8 linear layers: 2 on {trtllm}, 8x4 scales up to M = 128 {listed}",
                "emulated in torch",
            ),
            (
                three,
                {},
                rf"1 on {trtllm}, 128x4 scales \(0 \[576, 1536\]\); ",
                r"flashinfer_cutlass \(1 \[960, 576\]\) since K = 576 is not",
                r"weight_only \(2 .*smaller than 128",
            ),
            (
                two,
                dict(LINEAR_BACKEND=forced),
                f"2 on flashinfer_cutlass .* since {why}",
                "no MXFP8 layer of this model matches nothing",
            ),
            (two, dict(TRTLLM_SF_LAYOUT="8x4"), rf"2 on {trtllm}, 8x4 scales \("),
        ):
            with self.subTest(environment, shapes=shapes):
                log = self.log(shapes, **environment)
                for line in lines:
                    self.assertRegex(log, f"(?m){line}")
                self.assertEqual("matches" in log, "nothing" in lines[-1])

    def test_a_k_that_is_no_mxfp8_is_refused_at_load(self):
        for n, k in (256, 144), (256, 400), (40, 72):
            with self.assertRaisesRegex(
                ValueError, rf"m.proj \[{n}, {k}\].*K % 32.*modules_to_not_convert"
            ):
                mxfp8_linear(n, k)


class TestTable(CustomTestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())

    def write(self, text: str, device="Some GPU") -> None:
        Path(self.folder, scale_layout.config_file(device)).write_text(text)

    def read(self, folder=None):
        scale_layout.tuned_layers.cache_clear()
        return scale_layout.tuned_layers(folder or self.folder, "Some GPU", "0.6.7")

    def table(self, **changes) -> str:
        shape = {"N=2560,K=8192": {"max_m_8x4": 64, "backend": "flashinfer_cutlass"}}
        table = dict(device_name="Some GPU", flashinfer="0.6.7", layers=shape)
        return json.dumps({**table, **changes})

    def test_a_table_is_read(self):
        self.write(self.table())
        expected = {(2560, 8192): TunedLayer(64, CUTLASS.value)}
        self.assertEqual(self.read(), expected)

    def test_a_wrong_or_stale_one_is_ignored_with_a_warning(self):
        entry = {"max_m_8x4": 1}
        for text, reason in (
            ("{", "Expecting"),
            ("[]", "no attribute"),
            (self.table(device_name="Another"), "for device_name 'Another'"),
            (self.table(flashinfer="0.6.6"), "for flashinfer '0.6.6', this is '0.6.7'"),
            (self.table(rehearsal=True), "rehearsal"),
            (self.table(layers={"2560x8192": entry}), "is not N="),
            (self.table(layers={"N=1,K=2": {"max_m_8x4": True}}), "max_m_8x4 is True"),
            (self.table(layers={"N=1,K=2": {"max_m_8x4": -1}}), "max_m_8x4 is -1"),
            (
                self.table(layers={"N=1,K=2": {**entry, "backend": "x"}}),
                "backend is 'x",
            ),
        ):
            self.write(text)
            with self.subTest(reason), self.assertLogs("sglang", "WARNING") as logs:
                self.assertEqual(self.read(), {})
            told = f"Ignored .*{reason}.*tune_mxfp8_layout.py"
            self.assertRegex(logs.output[0], told)
        with self.assertLogs("sglang", "WARNING") as logs:
            self.assertEqual(self.read("/no/such"), {})
        self.assertIn("SGLANG_MXFP8_CONFIG_DIR has no /no/such", logs.output[0])

    def test_a_layer_uses_the_table_of_this_machine(self):
        here = dict(device_name="cpu", flashinfer=scale_layout.flashinfer_version())
        layers = {"N=256,K=512": {"max_m_8x4": 3}}
        self.write(self.table(**here, layers=layers), "cpu")
        with envs.SGLANG_MXFP8_CONFIG_DIR.override(self.folder):
            layer = mxfp8_linear(256, 512)
        self.assertEqual(layer.mxfp8_weights.choice.max_m_8x4, 3)


if __name__ == "__main__":
    unittest.main()
