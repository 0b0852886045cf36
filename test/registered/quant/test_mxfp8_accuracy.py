"""Perplexity of SmolLM2 in MXFP8 beside bf16, through real servers on a CPU.

FlashInfer's kernels are emulated. MXFP8_TEST_MODEL names the MXFP8 checkpoint, and the
bf16 one that it was made from lies beside it, without "-MXFP8" in its name.
"""

import importlib.util
import json
import math
import os
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=90, suite="default")

SCRIPT = Path(__file__).resolve().parents[3] / "benchmark" / "mxfp8" / "accuracy.py"
SPEC = importlib.util.spec_from_file_location("mxfp8_accuracy", SCRIPT)
accuracy = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(accuracy)

MODEL = os.environ.get("MXFP8_TEST_MODEL", "")
BF16_MODEL = MODEL.removesuffix("-MXFP8")
WINDOW, TOKENS = 768, 1536
NO_MODEL = "MXFP8_TEST_MODEL names no checkpoint; see scripts/test.sh"


def run(logprobs, name="bf16", tokens="same") -> dict:
    return dict(name=name, where="cpu; sglang 0.5.9", tokens=tokens, logprobs=logprobs)


class TestReport(CustomTestCase):
    base = run([[-1.0, -2.0], [-2.0, -3.0]])
    other = run([[-1.5, -2.5], [-2.0, -3.0]], "trtllm")

    def test_windows_are_what_is_independent(self):
        # Means 2 and 6: a standard deviation of sqrt(8), over sqrt(2).
        mean, error = accuracy.clustered_mean([[1.0, 3.0], [5.0, 7.0]])
        self.assertAlmostEqual(mean, 4.0)
        self.assertAlmostEqual(error, 2.0)
        for windows in ([], [[1.0, 2.0]], [[1.0, 2.0], [3.0]]):
            with self.assertRaisesRegex(ValueError, "two windows of one length"):
                accuracy.clustered_mean(windows)

    def test_tokens_are_paired(self):
        base, other = [[-1.0, -5.0], [-9.0, -2.0]], [[-1.5, -5.5], [-8.5, -1.5]]
        paired = accuracy.differences(base, other)
        self.assertEqual(paired, [[0.5, 0.5], [-0.5, -0.5]])
        self.assertEqual(accuracy.mean_change(base, other), 0.5)  # though they cancel
        for short in ([[-1.0]] * 2, [[-1.0, -1.0]]):
            with self.assertRaises(ValueError):
                accuracy.differences(base, short)

    def test_it_has_a_row_for_each_run_and_pairs_with_the_first(self):
        equal = {**self.other, "name": "cutlass"}
        lines = list(accuracy.report([self.base, self.other, equal]))
        # NLL 2 +- 0.5, so e^2, and half of it; then 2.25 +- 0.25.
        self.assertIn("| bf16 | 7.39 ± 3.69 | 2.0000 ± 0.5000 |  |  |", lines)
        trtllm = "9.49 ± 2.37 | 2.2500 ± 0.2500 | 0.2500 ± 0.2500 | 0.250 |"
        self.assertIn(f"| trtllm | {trtllm}", lines)
        text = "\n".join(lines)
        self.assertIn("emulated in plain torch and nothing ran on SM100", text)
        self.assertIn("of trtllm and cutlass are equal, bit for bit", text)
        changed = {**equal, "logprobs": [[-1.5, -2.5], [-2.0, -3.5]]}
        text = "\n".join(accuracy.report([self.base, self.other, changed]))
        self.assertIn("differ in 1 tokens", text)

    def test_runs_over_different_tokens_are_refused(self):
        other = {**self.other, "tokens": "another"}
        with self.assertRaisesRegex(ValueError, "not asked for the same tokens"):
            list(accuracy.report([self.base, other]))


class TestWindows(CustomTestCase):
    def test_they_do_not_overlap_and_what_fills_none_is_left_out(self):
        self.assertEqual(accuracy.split([*range(7)], 3), [[0, 1, 2], [3, 4, 5]])
        self.assertEqual(accuracy.split([*range(9)], 2, 5), [[0, 1], [2, 3]])

    def test_a_slice_shorter_than_two_windows_or_longer_than_the_text_is_refused(self):
        for tokens in (0, 5, 8):
            with self.assertRaisesRegex(ValueError, f"--tokens {tokens}"):
                accuracy.split([*range(7)], 3, tokens)

    def answered(self, *tokens):
        """What window_logprobs makes of a server's answer to tokens 7, 8, 9."""
        response = mock.Mock()
        response.json.return_value = {"meta_info": {"input_token_logprobs": tokens}}
        with mock.patch.object(accuracy.requests, "post", return_value=response):
            return accuracy.window_logprobs("http://server", [7, 8, 9])

    def test_the_first_token_is_not_scored(self):
        tokens = [None, 7, None], [-1.0, 8, None], [0.0, 9, None]
        self.assertEqual(self.answered(*tokens), [-1.0, 0.0])

    def test_answers_that_cannot_be_right_are_refused(self):
        first, last = [None, 7, None], [-1.0, 9, None]
        for bad in (math.nan, -math.inf, 0.5):
            with self.assertRaisesRegex(ValueError, "not all finite"):
                self.answered(first, [bad, 8, None], last)
        for tokens in ([first, last], [first, [-1.0, 3, None], last]):
            with self.assertRaisesRegex(ValueError, "other tokens"):
                self.answered(*tokens)


@unittest.skipUnless(MODEL, NO_MODEL)
class TestText(CustomTestCase):
    def test_it_has_20000_tokens_and_is_the_book_alone(self):
        self.assertGreaterEqual(len(accuracy.tokenize(MODEL)), 20_000)
        text = accuracy.TEXT.read_bytes()
        self.assertTrue(text.isascii() and b"\r" not in text)
        self.assertLess(len(text), 110_000)
        self.assertNotRegex(text.lower(), b"gutenberg|copyright|license")


@unittest.skipUnless(MODEL, NO_MODEL)
@unittest.skipIf(torch.cuda.is_available(), "a CPU test: the bound is the emulation's")
class TestAccuracy(CustomTestCase):
    bound = 0.06  # nats; on this slice MXFP8 costs 0.031, on the whole text 0.028

    def test_mxfp8_is_as_good_as_it_was_measured_to_be(self):
        with tempfile.TemporaryDirectory() as folder:
            runs = []
            for model, backend in (BF16_MODEL, "auto"), (MODEL, "flashinfer_trtllm"):
                with accuracy.server(model, backend) as (url, layers):
                    runs.append(Path(folder, backend))
                    self.ask(url, runs[-1])
            self.assertRegex(layers, "30 on flashinfer_trtllm")
            bf16, mxfp8 = (json.loads(path.read_text())["logprobs"] for path in runs)
            table = subprocess.check_output([SCRIPT, "--compare", *runs], text=True)
        self.assertIn("flashinfer_trtllm |", table)
        mean, _ = accuracy.clustered_mean(accuracy.differences(bf16, mxfp8))
        self.assertLess(abs(mean), self.bound)
        # Two servers of one model would differ less: this one did run in MXFP8.
        self.assertGreater(accuracy.mean_change(bf16, mxfp8), 0.05)

    def ask(self, url: str, output: Path):
        options = ["--window", str(WINDOW), "--tokens", str(TOKENS), "--output", output]
        subprocess.run([SCRIPT, "--url", url, *options], check=True)


if __name__ == "__main__":
    unittest.main()
