"""tune_mxfp8_layout.py: what it decides, the table it writes, and its command line."""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization import mxfp8_routing
from sglang.srt.layers.quantization.mxfp8_routing import (
    Mxfp8LinearBackend,
    Mxfp8LinearOptions,
    TunedLayer,
    select_mxfp8_linear_backend,
    tuned_layers,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import tiny_llama_tensors, write_checkpoint
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=100, suite="default")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmark/kernels/quantization/tune_mxfp8_layout.py"
TRTLLM = Mxfp8LinearBackend.FLASHINFER_TRTLLM
CUTLASS = Mxfp8LinearBackend.FLASHINFER_CUTLASS
GPU, VERSION = "NVIDIA GB200", "0.6.7.post3"
ENVIRONMENT = {"device_name": GPU, "flashinfer": VERSION, "torch": "2.9.1"}


def load_script():
    """The script as a module; like a script, it imports from its own directory."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(SCRIPT.parent), *sys.path]):
        spec.loader.exec_module(module)
    return module


tune = load_script()


def measured(n, k, us_8x4, us_128x4, cutlass):
    us = {"trtllm_8x4": us_8x4, "trtllm_128x4": us_128x4, "cutlass": cutlass}
    return tune.Measured(n, k, {name: times for name, times in us.items() if times})


# 8x4 wins up to M = 8, cutlass from 128 on.
NARROW = measured(
    *(256, 512),
    {1: 4.0, 8: 5.0, 128: 9.0, 1024: 80.0},
    {1: 6.0, 8: 6.0, 128: 8.0, 1024: 30.0},
    {1: 7.0, 8: 7.0, 128: 7.0, 1024: 20.0},
)
WIDE = measured(8192, 4096, {1: 9.0, 8: 9.5}, {1: 8.0, 8: 8.0}, {1: 9.0, 8: 9.0})
RAGGED = measured(160, 256, {}, {1: 3.0}, {1: 4.0})


def selected(directory, n, k, is_auto=True):
    options = Mxfp8LinearOptions(
        preferred=TRTLLM,
        available=(TRTLLM, CUTLASS),
        is_auto=is_auto,
        tuned=tuned_layers(str(directory), GPU, VERSION),
    )
    return select_mxfp8_linear_backend(options, n, k, torch.bfloat16)


class TuningTestCase(CustomTestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.addCleanup(tuned_layers.cache_clear)
        self.directory = Path(directory.name)

    def write(self, *shapes, **settings):
        environment = {**ENVIRONMENT, **settings.pop("environment", {})}
        table = tune.new_table(shapes, environment, **settings)
        tuned_layers.cache_clear()
        return tune.write_table(self.directory, table)


class TestDecisions(CustomTestCase):
    def test_crossover(self):
        slower, faster, same = 2.0, 0.5, 1.0
        for name, us_8x4, expected in (
            ("none", {1: slower, 2: slower, 4: slower}, 0),
            ("all", {1: faster, 2: faster, 4: faster}, 4),
            ("up to", {1: faster, 2: faster, 4: slower}, 2),
            ("a tie counts", {1: same, 2: same, 4: slower}, 2),
            ("again later", {1: faster, 2: slower, 4: faster}, 1),
            ("late only", {1: slower, 2: faster, 4: faster}, 0),
            ("unsorted", {4: slower, 1: faster, 2: faster}, 2),
            ("not measured", {}, 0),
        ):
            with self.subTest(name):
                us_128x4 = {1: 1.0, 2: 1.0, 4: 1.0}
                self.assertEqual(tune.crossover(us_8x4, us_128x4), expected)

    def test_the_backend_is_that_of_the_smaller_sum(self):
        self.assertEqual(tune.fastest_backend(NARROW, [1, 8]), TRTLLM.value)
        self.assertEqual(tune.fastest_backend(NARROW, [128]), CUTLASS.value)
        # 5 + 8 = 13 for trtllm with the layout of each M, 7 + 7 for cutlass.
        self.assertEqual(tune.fastest_backend(NARROW, [8, 128]), TRTLLM.value)
        self.assertEqual(tune.fastest_backend(NARROW, [1, 1024]), CUTLASS.value)
        tie = measured(256, 512, {1: 5.0}, {1: 4.0}, {1: 4.0})
        self.assertEqual(tune.fastest_backend(tie, [1]), TRTLLM.value)

    def test_the_report_marks_the_fastest_at_both_ends(self):
        names = {(256, 512): "o_proj"}
        lines = tune.markdown([NARROW, RAGGED], names).split("\n")
        self.assertEqual(len({line.count("|") for line in lines}), 1)
        self.assertIn("| o_proj | 256 x 512 | 1 | **4.00** | 6.00 | 7.00 |", lines)
        self.assertIn(
            "| o_proj | 256 x 512 | 1024 | 80.00 | 30.00 | **20.00** |", lines
        )
        self.assertIn("|  | 160 x 256 | 1 | - | **3.00** | 4.00 |", lines)
        self.assertEqual(
            tune.summary([NARROW]),
            "- N=256,K=512: 8x4 up to M = 8; backend left to --fp8-gemm-backend; "
            "fastest at M = 1 trtllm_8x4, at M = 1024 cutlass",
        )


class TestTable(TuningTestCase):
    def test_the_server_reads_what_was_written(self):
        self.write(NARROW, WIDE, RAGGED)
        self.assertEqual(
            dict(tuned_layers(str(self.directory), GPU, VERSION)),
            {
                (256, 512): TunedLayer(8),
                (8192, 4096): TunedLayer(0),
                (160, 256): TunedLayer(0),
            },
        )
        choice = selected(self.directory, 256, 512)
        self.assertEqual((choice.backend, choice.max_m_8x4), (TRTLLM, 8))
        self.assertEqual(selected(self.directory, 8192, 4096).max_m_8x4, 0)

    def test_a_backend_in_the_table_counts_under_auto(self):
        self.write(NARROW, backend_at=[1024])
        choice = selected(self.directory, 256, 512)
        self.assertEqual((choice.backend, choice.max_m_8x4), (CUTLASS, 0))
        choice = selected(self.directory, 256, 512, is_auto=False)
        self.assertEqual((choice.backend, choice.max_m_8x4), (TRTLLM, 8))

    def test_a_rehearsal_is_ignored_with_a_warning(self):
        self.write(NARROW, rehearsal=True)
        with self.assertLogs(mxfp8_routing.logger, "WARNING") as logs:
            self.assertEqual(tuned_layers(str(self.directory), GPU, VERSION), {})
        self.assertIn("it is a rehearsal", logs.output[0])

    def test_the_medians_and_the_environment_are_kept(self):
        table = json.loads(self.write(NARROW).read_text())
        kept = table["measured"]["N=256,K=512"]
        self.assertEqual(kept["environment"], ENVIRONMENT)
        self.assertEqual(kept["median_us"]["cutlass"]["1024"], 20.0)

    def test_other_shapes_of_the_table_are_kept(self):
        self.write(NARROW, WIDE, backend_at=[1])
        again = measured(256, 512, {1: 9.0}, {1: 8.0}, {1: 7.0})
        path = self.write(again, environment={"torch": "2.10"})
        tuned = tuned_layers(str(self.directory), GPU, VERSION)
        self.assertEqual(tuned[256, 512], TunedLayer(0))
        self.assertEqual(tuned[8192, 4096], TunedLayer(0, TRTLLM))
        kept = json.loads(path.read_text())["measured"]
        self.assertEqual(kept["N=8192,K=4096"]["environment"]["torch"], "2.9.1")
        self.assertEqual(kept["N=256,K=512"]["environment"]["torch"], "2.10")
        self.assertEqual(os.listdir(self.directory), [path.name])

    def test_a_table_that_cannot_be_merged_is_set_aside(self):
        path = self.directory / "device_name=NVIDIA_GB200.json"
        stale = tune.new_table([WIDE], {**ENVIRONMENT, "flashinfer": "0.6.6"})
        rehearsal = tune.new_table([WIDE], ENVIRONMENT, rehearsal=True)
        for name, text in (
            ("another version", json.dumps(stale)),
            ("a rehearsal", json.dumps(rehearsal)),
            ("no table", "[]"),
            ("no JSON", "{"),
        ):
            with self.subTest(name):
                path.write_text(text)
                self.assertEqual(self.write(NARROW), path)
                tuned = tuned_layers(str(self.directory), GPU, VERSION)
                self.assertEqual(set(tuned), {(256, 512)})
                self.assertEqual(path.with_suffix(".json.old").read_text(), text)

    def test_rehearsals_merge_too(self):
        self.write(NARROW, rehearsal=True)
        table = json.loads(self.write(WIDE, rehearsal=True).read_text())
        self.assertEqual(set(table["layers"]), {"N=256,K=512", "N=8192,K=4096"})
        self.assertIs(table["rehearsal"], True)


@unittest.skipIf(
    not mxfp8_routing.mxfp8_kernels_missing(TRTLLM), "this machine has the kernels"
)
class TestCommandLine(TuningTestCase):
    def run_script(self, *arguments):
        return subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
        )

    def rehearse(self, *arguments):
        arguments = (*arguments, "--rehearse", "--output", self.directory)
        result = self.run_script(*arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("says nothing about the speed", result.stdout)
        (path,) = self.directory.iterdir()
        table = json.loads(path.read_text())
        self.assertIs(table["rehearsal"], True)
        return table, result

    def test_rehearsal_of_shapes(self):
        shapes = ("--shapes", "256,256", "160,256")
        table, result = self.rehearse(*shapes, "--m", 2, 1, "--backend-at", 3)
        self.assertEqual(set(table["layers"]), {"N=256,K=256", "N=160,K=256"})
        self.assertEqual(table["layers"]["N=160,K=256"]["max_m_8x4"], 0)
        for shape, entry in table["layers"].items():
            self.assertIn(entry["backend"], (TRTLLM.value, CUTLASS.value))
            medians = table["measured"][shape]["median_us"]
            self.assertEqual("trtllm_8x4" in medians, shape == "N=256,K=256")
            for times in medians.values():
                self.assertEqual(list(times), ["1", "2", "3"])
                self.assertGreater(min(times.values()), 0)
        self.assertEqual(result.stdout.count("| 256 x 256 |"), 3)

    def test_rehearsal_of_a_models_rank(self):
        changes = dict(intermediate_size=1024, num_key_value_heads=2)
        tensors = tiny_llama_tensors(**changes)
        with tempfile.TemporaryDirectory() as checkpoint:
            write_checkpoint(checkpoint, tensors, **changes)
            arguments = ("--model", checkpoint, "--tp", 2, "--m", 1)
            table, result = self.rehearse(*arguments)
        self.assertEqual(
            set(table["layers"]),
            {"N=384,K=512", "N=512,K=256", "N=1024,K=512", "N=512,K=512"},
        )
        for line in ("| qkv_proj | 384 x 512 |", "| down_proj | 512 x 512 |"):
            self.assertIn(line, result.stdout)

    def test_a_models_layers_that_trtllm_does_not_take_are_named(self):
        with tempfile.TemporaryDirectory() as checkpoint:
            write_checkpoint(checkpoint, tiny_llama_tensors())
            table, result = self.rehearse("--model", checkpoint, "--m", 1)
        self.assertEqual(
            set(table["layers"]), {"N=640,K=512", "N=512,K=512", "N=1088,K=512"}
        )
        self.assertIn("Not on flashinfer_trtllm: down_proj [512, 544]", result.stderr)

    def test_refusals(self):
        for arguments, message in (
            (("--shapes", "256,256"), "SM100 or SM103 GPU"),
            (("--shapes", "256,256", "--rehearse"), "--rehearse needs --output"),
            (("--shapes", "256,128", "--rehearse"), "K = 128 is not a multiple of 256"),
            (("--shapes", "256", "--rehearse"), "invalid"),
            (("--m", "1"), "one of the arguments --model --shapes is required"),
        ):
            with self.subTest(arguments):
                argv, stderr = [str(SCRIPT), *arguments], io.StringIO()
                with mock.patch.object(sys, "argv", argv):
                    with contextlib.redirect_stderr(stderr):
                        with self.assertRaises(SystemExit) as exit:
                            tune.main()
                self.assertEqual(exit.exception.code, 2)
                self.assertIn(message, stderr.getvalue())

    def test_refusal_of_the_process(self):
        with envs.SGLANG_MXFP8_EMULATION.override(True):
            result = self.run_script("--shapes", "256,256", "--output", self.directory)
        self.assertEqual(result.returncode, 2)
        self.assertIn("it needs an SM100 or SM103 GPU", result.stderr)
        self.assertEqual(os.listdir(self.directory), [])


if __name__ == "__main__":
    unittest.main()
