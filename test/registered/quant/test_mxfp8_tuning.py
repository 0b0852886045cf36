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


def medians(us_8x4: dict, us_128x4: dict, cutlass: dict) -> dict:
    """Microseconds as they are measured, by M and by candidate, of those by M."""
    named = {tune.NEW: us_8x4, tune.OLD: us_128x4, tune.CUTLASS: cutlass}
    return {m: {name: us[m] for name, us in named.items()} for m in us_128x4}


class TestDecisions(CustomTestCase):
    def test_crossover(self):
        slower, faster, same = 2.0, 0.5, 1.0
        for name, us_8x4, expected in (
            ("none", {1: slower, 2: slower, 4: slower}, 0),
            ("all", {1: faster, 2: faster, 4: faster}, 4),
            ("a tie counts", {1: same, 2: same, 4: slower}, 2),
            ("again later", {1: faster, 2: slower, 4: faster}, 1),
            ("late only", {1: slower, 2: faster, 4: faster}, 0),
        ):
            with self.subTest(name):
                us = dict.fromkeys(us_8x4, 1.0)
                self.assertEqual(tune.crossover(medians(us_8x4, us, us)), expected)

    def test_the_server_reads_what_was_written(self):
        """The backend is that of the smaller sum, with the layout of each M. A shape that
        is measured again replaces what was measured before."""
        us = medians({1: 4.0, 128: 9.0}, {1: 6.0, 128: 8.0}, {1: 7.0, 128: 6.0})
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "device_name=NVIDIA_GB200.json")
            for shape, backend_at in (
                ("N=256,K=512", [1]),
                ("N=512,K=512", [1, 128]),
                ("N=768,K=512", [128]),
                ("N=256,K=512", []),
            ):
                table = tune.read_table(path, False, GPU, VERSION)
                table["layers"][shape] = tune.tuned_entry(us, backend_at)
                tune.write_table(path, table)
            expected = {256: None, 512: TRTLLM, 768: CUTLASS}
            expected = {(n, 512): TunedLayer(1, b) for n, b in expected.items()}
            self.assertEqual(tuned_layers(directory, GPU, VERSION), expected)
            # One that cannot be merged is set aside.
            table = tune.read_table(path, False, GPU, "0.6.8")
            self.assertEqual(table["layers"], {})
            self.assertTrue(path.with_suffix(".json.old").exists())


@unittest.skipIf(tune.HAS_GPU, "the rehearsal is for a CPU")
class TestCommandLine(CustomTestCase):
    def test_rehearsal(self):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            log.write_text(LOG)
            arguments = ("--shapes", "256,256", "160,256", "--log", log, "--m", 1)
            arguments += ("--rehearse", "--output", folder)
            arguments += ("--backend-at", 3) if tune.routing else ()
            command = [sys.executable, SCRIPT, *map(str, arguments)]
            result = subprocess.run(command, capture_output=True, text=True)
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


if __name__ == "__main__":
    unittest.main()
