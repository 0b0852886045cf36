"""tune_mxfp8_layout.py: what it decides, the table it writes, and its command line."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from sglang.srt.layers.quantization.mxfp8.scale_layout import TunedLayer, tuned_layers
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=50, suite="default")

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmark/kernels/quantization/tune_mxfp8_layout.py"
sys.path.append(str(SCRIPT.parent))
import tune_mxfp8_layout as tune

CUTLASS, TRTLLM = "flashinfer_cutlass", "flashinfer_trtllm"
GPU, VERSION = "NVIDIA GB200", "0.6.7.post3"
LOG = """[TP0] MXFP8 linear layers: 9 on flashinfer_cutlass (qkv_proj [960, 576]) since K = 576
[TP0] MXFP8 linear layers: 30 on flashinfer_trtllm (down_proj [576, 1536], o_proj [96, 512])
[TP0] another line (down_proj [1024, 1024])
"""


def medians(us_8x4, us_128x4, cutlass):
    """Microseconds as they are measured: by M, then by candidate."""
    named = {tune.NEW: us_8x4, tune.OLD: us_128x4, tune.CUTLASS: cutlass}
    return {
        m: {name: us[m] for name, us in named.items() if us} for m in sorted(us_128x4)
    }


# 8x4 wins up to M = 8, cutlass from 128 on.
NARROW = medians(
    {1: 4.0, 8: 5.0, 128: 9.0, 1024: 80.0},
    {1: 6.0, 8: 6.0, 128: 8.0, 1024: 30.0},
    {1: 7.0, 8: 7.0, 128: 7.0, 1024: 20.0},
)
WIDE = medians({1: 9.0, 8: 9.5}, {1: 8.0, 8: 8.0}, {1: 9.0, 8: 9.0})


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
            ("not measured", {}, 0),
        ):
            with self.subTest(name):
                us = dict.fromkeys((1, 2, 4), 1.0)
                self.assertEqual(tune.crossover(medians(us_8x4, us, us)), expected)

    def test_the_backend_is_that_of_the_smaller_sum(self):
        tie = medians({1: 5.0}, {1: 4.0}, {1: 4.0})
        for us, at, expected in (
            (NARROW, [1, 8], TRTLLM),
            (NARROW, [128], CUTLASS),
            # 5 + 8 = 13 for trtllm with the layout of each M, 7 + 7 for cutlass.
            (NARROW, [8, 128], TRTLLM),
            (NARROW, [1, 1024], CUTLASS),
            (tie, [1], TRTLLM),
        ):
            with self.subTest(at=at):
                self.assertEqual(tune.tuned_entry(us, at)["backend"], expected)

    def test_the_server_reads_what_was_written(self):
        """A shape that is measured again replaces what was measured before."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "device_name=NVIDIA_GB200.json")
            for n, k, us, backend_at in (
                (256, 512, NARROW, [1]),
                (8192, 4096, WIDE, [1]),
                (256, 512, NARROW, []),
            ):
                table = tune.read_table(path, False, GPU, VERSION)
                table["layers"][f"N={n},K={k}"] = tune.tuned_entry(us, backend_at)
                tune.write_table(path, table)
            tuned = tuned_layers(directory, GPU, VERSION)
            wide = TunedLayer(0, TRTLLM)
            self.assertEqual(tuned, {(256, 512): TunedLayer(8), (8192, 4096): wide})
            # One that cannot be merged is set aside.
            text = path.read_text()
            for version, rehearsal in ("0.6.8", False), (VERSION, True):
                path.write_text(text)
                table = tune.read_table(path, rehearsal, GPU, version)
                self.assertEqual(table["layers"], {})
                self.assertEqual(path.with_suffix(".json.old").read_text(), text)


@unittest.skipIf(tune.HAS_GPU, "the rehearsal is for a CPU")
class TestCommandLine(CustomTestCase):
    def run_script(self, *arguments):
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    def test_rehearsal(self):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            log.write_text(LOG)
            arguments = ("--shapes", "256,256", "160,256", "--log", log, "--m", 1)
            arguments += ("--rehearse", "--output", folder)
            arguments += ("--backend-at", 3) if tune.routing else ()
            result = self.run_script(*arguments)
            self.assertEqual(result.returncode, 0, result.stderr)
            (path,) = Path(folder).glob("*.json")
            table = json.loads(path.read_text())
        self.assertIn("says nothing about speed", result.stdout)
        self.assertIs(table["rehearsal"], True)
        shapes = {"N=256,K=256", "N=160,K=256", "N=576,K=1536"}
        self.assertEqual(set(table["layers"]), shapes)
        for shape, entry in table["layers"].items():
            backends = (TRTLLM, CUTLASS) if tune.routing else (None,)
            self.assertIn(entry.get("backend"), backends)
            for times in table["measured"][shape]["median_us"].values():
                self.assertEqual(tune.NEW in times, shape == "N=256,K=256")
                self.assertGreater(min(times.values()), 0)

    def test_without_a_gpu_it_says_what_is_needed(self):
        result = self.run_script("--shapes", "256,256")
        self.assertEqual(result.returncode, 2)
        self.assertIn("without a CUDA GPU, and needed there", result.stderr)


if __name__ == "__main__":
    unittest.main()
