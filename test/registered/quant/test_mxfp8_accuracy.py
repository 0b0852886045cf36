"""Perplexity of SmolLM2 in MXFP8 beside bf16, through real servers on a CPU.

FlashInfer's kernels are emulated. MXFP8_TEST_MODEL names the MXFP8 checkpoint, and the
bf16 one that it was made from lies beside it, without "-MXFP8" in its name.
"""

import importlib.util
import math
import os
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


def run(logprobs, backend="bf16", digest="same") -> accuracy.Run:
    return accuracy.Run("model", backend, "cpu", "0.5.9", "", digest, logprobs)


class TestStatistics(CustomTestCase):
    def test_windows_are_what_is_independent(self):
        # Means 2 and 6: a standard deviation of sqrt(8), over sqrt(2).
        mean, error = accuracy.clustered_mean([[1.0, 3.0], [5.0, 7.0]])
        self.assertAlmostEqual(mean, 4.0)
        self.assertAlmostEqual(error, 2.0)

    def test_one_window_and_unequal_windows_have_no_error(self):
        for windows in ([], [[1.0, 2.0]], [[1.0, 2.0], [3.0]]):
            with self.assertRaisesRegex(ValueError, "two windows of one length"):
                accuracy.clustered_mean(windows)

    def test_a_uniform_guess_has_the_vocabularys_perplexity(self):
        nll = accuracy.negative_log_likelihood([[-math.log(50)] * 4] * 3)
        perplexity = accuracy.exponential(nll)
        self.assertAlmostEqual(perplexity.mean, 50.0)
        self.assertAlmostEqual(perplexity.error, 0.0)

    def test_pairing_takes_the_texts_own_spread_out(self):
        base = [[-1.0, -5.0], [-9.0, -2.0]]
        other = [[p - 0.5 for p in window] for window in base]
        self.assertEqual(accuracy.paired_difference(base, other), (0.5, 0.0))
        self.assertGreater(accuracy.negative_log_likelihood(base).error, 1)
        ratio = accuracy.exponential(accuracy.paired_difference(base, other))
        self.assertAlmostEqual(ratio.mean, math.exp(0.5))

    def test_changes_that_cancel_are_changes(self):
        base, other = [[-1.0, -1.0]] * 2, [[-0.5, -1.5]] * 2
        self.assertEqual(accuracy.paired_difference(base, other).mean, 0)
        self.assertEqual(accuracy.mean_change(base, other), 0.5)

    def test_runs_of_different_lengths_are_not_paired(self):
        for other in ([[-1.0]] * 2, [[-1.0, -1.0]]):
            with self.assertRaises(ValueError):
                accuracy.paired_difference([[-1.0, -1.0]] * 2, other)


class TestTable(CustomTestCase):
    base = run([[-1.0, -2.0], [-2.0, -3.0]])
    other = run([[-1.5, -2.5], [-2.0, -3.0]], "flashinfer_trtllm")

    def test_it_has_a_row_for_each_run_and_pairs_with_the_first(self):
        head, rule, base, other = accuracy.compare([self.base, self.other]).split("\n")
        self.assertEqual({line.count("|") for line in (rule, base, other)}, {7})
        # NLL 2 +- 0.5, so e^2, and half of it; then 2.25 +- 0.25.
        self.assertEqual(base, "| bf16 | 7.39 ± 3.69 | 2.0000 ± 0.5000 |  |  |  |")
        self.assertEqual(
            other,
            "| MXFP8, flashinfer_trtllm | 9.49 ± 2.37 | 2.2500 ± 0.2500 "
            "| 0.2500 ± 0.2500 | 1.2840 ± 0.3210 | 0.250 |",
        )

    def test_runs_over_different_tokens_are_refused(self):
        with self.assertRaisesRegex(ValueError, "not asked for the same tokens"):
            accuracy.compare([self.base, self.other._replace(digest="another")])

    def test_the_report_says_what_was_emulated_and_whether_backends_differ(self):
        cutlass = self.other._replace(backend="flashinfer_cutlass")
        text = "\n".join(accuracy.report([self.base, self.other, cutlass]))
        self.assertIn("emulated in plain torch and nothing ran on SM100", text)
        self.assertIn("are equal, bit for bit", text)
        changed = cutlass._replace(logprobs=[[-1.5, -2.5], [-2.0, -3.5]])
        text = "\n".join(accuracy.report([self.base, self.other, changed]))
        self.assertIn("differ in 1 of 4", text)


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

    def served(self, model: str, backend: str) -> accuracy.Run:
        with accuracy.server(model, backend) as (url, layers):
            return accuracy.measure(url, WINDOW, TOKENS, layers)

    def test_mxfp8_is_as_good_as_it_was_measured_to_be(self):
        bf16 = self.served(BF16_MODEL, "auto")
        mxfp8 = self.served(MODEL, "flashinfer_trtllm")
        print(accuracy.compare([bf16, mxfp8]))
        self.assertEqual([bf16.label, bf16.layers], ["bf16", ""])
        self.assertEqual(mxfp8.label, "MXFP8, flashinfer_trtllm")
        self.assertRegex(mxfp8.layers, "30 on flashinfer_trtllm")
        difference = accuracy.paired_difference(bf16.logprobs, mxfp8.logprobs)
        self.assertLess(abs(difference.mean), self.bound)
        # Two servers of one model would differ less: this one did run in MXFP8.
        self.assertGreater(accuracy.mean_change(bf16.logprobs, mxfp8.logprobs), 0.05)


if __name__ == "__main__":
    unittest.main()
