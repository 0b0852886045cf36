"""accuracy.py: its report, and SmolLM2 in MXFP8 beside bf16, by a real server on a CPU.

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
from transformers import AutoModelForCausalLM

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import reference_logprobs
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=50, suite="default")

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
    def test_windows_are_what_is_independent_and_servers_are_paired_with_the_first(
        self,
    ):
        runs = {"bf16": BASE, "trtllm": OTHER, "cutlass": OTHER.copy()}
        lines = list(accuracy.report(runs))
        # NLL 2 +- 0.5, so e^2, and half of it; then 2.25 +- 0.25.
        self.assertIn("| bf16 | 7.39 ± 3.69 | 2.0000 ± 0.5000 |  |  |", lines)
        trtllm = "9.49 ± 2.37 | 2.2500 ± 0.2500 | 0.2500 ± 0.2500 | 0.250 |"
        self.assertIn(f"| trtllm | {trtllm}", lines)
        self.assertIn("of trtllm and cutlass are equal, bit for bit", lines[-1])
        runs["cutlass"][1, 1] = -3.5
        self.assertIn("differ in 1 tokens", [*accuracy.report(runs)][-1])
        with self.assertRaisesRegex(ValueError, "fewer than two windows"):
            list(accuracy.report({name: run[:1] for name, run in runs.items()}))

    def test_answers_that_cannot_be_right_are_refused(self):
        first, right = [None, 7, None], [-1.0, 8, None]
        for answer, message in (
            ([first, [math.nan, 8, None]], "not all finite"),
            ([first, [-math.inf, 8, None]], "not all finite"),
            ([first, [0.5, 8, None]], "not all finite"),
            ([first], "other tokens"),
            ([first, [-1.0, 3, None]], "other tokens"),
            ([first, right], ""),
        ):
            response = mock.Mock()
            response.json.return_value = {"meta_info": {"input_token_logprobs": answer}}
            with mock.patch.object(accuracy.requests, "post", return_value=response):
                if not message:
                    self.assertEqual(accuracy.window_logprobs("", [7, 8]), [-1.0])
                    continue
                with self.assertRaisesRegex(ValueError, message):
                    accuracy.window_logprobs("", [7, 8])


@unittest.skipUnless(MODEL, NO_MODEL)
@unittest.skipIf(torch.cuda.is_available(), "a CPU test: the bound is the emulation's")
class TestAccuracy(CustomTestCase):
    bound = 0.06  # nats; on this slice MXFP8 costs 0.031, on the whole text 0.028

    def test_mxfp8_is_as_good_as_it_was_measured_to_be(self):
        """Beside transformers with the bf16 model."""
        args = SimpleNamespace(bf16=BF16_MODEL, mxfp8=MODEL, window=768, tokens=1536)
        args.tp, args.arguments = "1", []
        layers, mxfp8 = accuracy.measure(args, "flashinfer_trtllm")
        self.assertRegex(layers, "30 on flashinfer_trtllm")
        self.assertEqual(mxfp8.shape, (2, 767))
        ids = accuracy.tokenize(MODEL)
        self.assertGreaterEqual(len(ids), 20_000)
        model = AutoModelForCausalLM.from_pretrained(BF16_MODEL, dtype=torch.bfloat16)
        windows = ids[:768], ids[768:1536]
        bf16 = torch.stack([reference_logprobs(model, w) for w in windows]).numpy()
        mean, _ = accuracy.clustered_mean(bf16 - mxfp8)
        self.assertLess(abs(mean), self.bound)
        # The server did run in MXFP8.
        self.assertGreater(numpy.abs(bf16 - mxfp8).mean(), 0.05)


if __name__ == "__main__":
    unittest.main()
