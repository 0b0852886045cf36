"""accuracy.py: SmolLM2 in MXFP8, by a real server on a CPU, beside bf16.

FlashInfer's kernels are emulated. MXFP8_TEST_MODEL names the MXFP8 checkpoint, and the
bf16 one that it was made from lies beside it, without "-MXFP8" in its name.
"""

import importlib.util
import os
import unittest
from pathlib import Path
from types import SimpleNamespace

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
        runs = dict(bf16=bf16, trtllm=mxfp8, cutlass=mxfp8.copy())
        self.assertRegex([*accuracy.report(runs)][-1], "trtllm and cutlass are equal")
        runs["cutlass"][1, 3] += 0.5
        self.assertRegex([*accuracy.report(runs)][-1], "differ in 1 tokens")
        mean, _ = accuracy.clustered_mean(bf16 - mxfp8)
        self.assertLess(abs(mean), self.bound)
        # The server did run in MXFP8.
        self.assertGreater(abs(bf16 - mxfp8).mean(), 0.05)


if __name__ == "__main__":
    unittest.main()
