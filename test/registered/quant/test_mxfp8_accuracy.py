"""Perplexity of SmolLM2 in MXFP8 beside bf16, through real servers on a CPU.

FlashInfer's kernels are emulated. MXFP8_TEST_MODEL names the MXFP8 checkpoint, and the
bf16 one that it was made from lies beside it, without "-MXFP8" in its name.
"""

import importlib.util
import math
import os
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy
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
NO_MODEL = "MXFP8_TEST_MODEL names no checkpoint; see scripts/test.sh"


BASE = numpy.array([[-1.0, -2.0], [-2.0, -3.0]])
OTHER = numpy.array([[-1.5, -2.5], [-2.0, -3.0]])


class TestReport(CustomTestCase):
    def test_windows_are_what_is_independent(self):
        # Means 2 and 6: a standard deviation of sqrt(8), over sqrt(2).
        mean, error = accuracy.clustered_mean(numpy.array([[1.0, 3.0], [5.0, 7.0]]))
        self.assertAlmostEqual(mean, 4.0)
        self.assertAlmostEqual(error, 2.0)
        with self.assertRaisesRegex(ValueError, "fewer than two windows"):
            accuracy.clustered_mean(numpy.array([[1.0, 2.0]]))

    def test_it_has_a_row_for_each_server_and_pairs_with_the_first(self):
        runs = {"bf16": BASE, "trtllm": OTHER, "cutlass": OTHER.copy()}
        lines = list(accuracy.report(runs))
        # NLL 2 +- 0.5, so e^2, and half of it; then 2.25 +- 0.25.
        self.assertIn("| bf16 | 7.39 ± 3.69 | 2.0000 ± 0.5000 |  |  |", lines)
        trtllm = "9.49 ± 2.37 | 2.2500 ± 0.2500 | 0.2500 ± 0.2500 | 0.250 |"
        self.assertIn(f"| trtllm | {trtllm}", lines)
        self.assertIn("of trtllm and cutlass are equal, bit for bit", lines[-1])
        runs["cutlass"][1, 1] = -3.5
        self.assertIn("differ in 1 tokens", [*accuracy.report(runs)][-1])


class TestWindows(CustomTestCase):
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
        args = SimpleNamespace(bf16=BF16_MODEL, mxfp8=MODEL, window=768, tokens=1536)
        args.tp, args.arguments = "1", []
        _, bf16 = accuracy.measure(args, "bf16")
        layers, mxfp8 = accuracy.measure(args, "flashinfer_trtllm")
        self.assertRegex(layers, "30 on flashinfer_trtllm")
        self.assertEqual(mxfp8.shape, (2, 767))
        mean, _ = accuracy.clustered_mean(bf16 - mxfp8)
        self.assertLess(abs(mean), self.bound)
        # Two servers of one model would differ less: this one did run in MXFP8.
        self.assertGreater(numpy.abs(bf16 - mxfp8).mean(), 0.05)


if __name__ == "__main__":
    unittest.main()
