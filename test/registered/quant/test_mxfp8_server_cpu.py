"""A real server with a real MXFP8 model on a CPU: its answers, against transformers.

FlashInfer's kernels are emulated. The model is named by MXFP8_TEST_MODEL: an MXFP8
checkpoint of SmolLM2-135M-Instruct, with trtllm and cutlass layers.
"""

import os
import unittest

import openai
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    CpuServer,
    as_reference,
    assert_as_close_as_bf16,
    load_mxfp8,
    mxfp8_linear,
    reference_linear,
    reference_logprobs,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=60, suite="default")

MODEL = os.environ.get("MXFP8_TEST_MODEL", "")
TEXT = (
    "The water cycle moves water between the oceans, the air and the land. The sun "
    "heats the sea, and water rises as vapour. High in the air it cools, and clouds "
    "form. Rain and snow bring the water back to the ground, where rivers carry it to "
    "the sea again. In winter, some of it stays on the mountains as ice for months."
)


@unittest.skipUnless(MODEL, "MXFP8_TEST_MODEL names no checkpoint; see scripts/test.sh")
class TestRealModel(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = cls.enterClassContext(CpuServer(MODEL))
        cls.tensors = load_file(os.path.join(MODEL, "model.safetensors"))
        cls.input_ids = AutoTokenizer.from_pretrained(MODEL)(TEXT)["input_ids"]
        config = AutoConfig.from_pretrained(MODEL)
        del config.quantization_config
        cls.reference = as_reference(LlamaForCausalLM(config).float(), cls.tensors)

    def test_it_answers(self):
        client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of Japan?"}],
            temperature=0,
            max_tokens=32,
        )
        self.assertIn("Tokyo", answer.choices[0].message.content)

    def test_it_checked_its_kernels(self):
        told = "MXFP8 self-check: 4 kernels are right"
        self.assertIn(told, self.server.log.getvalue())

    def test_logprobs_differ_from_transformers_no_more_than_bf16_moves_them(self):
        served = self.server.logprobs(self.input_ids)
        assert_as_close_as_bf16(served, self.reference, self.input_ids, times=1.2)
        # Its weights are e4m3 values and powers of two, which bf16 holds.
        expected = reference_logprobs(self.reference, self.input_ids)
        self.assertLess((served.mean() - expected.mean()).abs(), 0.1)

    def test_every_linear_agrees_with_transformers_to_bf16_rounding(self):
        """Each layer alone, on the activations that transformers gives it."""
        seen, worst = {}, 0.0
        for name, module in self.reference.named_modules():
            if f"{name}.weight_scale_inv" in self.tensors:
                note = lambda _, x, name=name: seen.update({name: x[0][0].bfloat16()})
                module.register_forward_pre_hook(note, prepend=True)
        reference_logprobs(self.reference, self.input_ids)
        for name, x in seen.items():
            own = [self.tensors[f"{name}.{n}"] for n in ("weight", "weight_scale_inv")]
            expected = reference_linear(x, *own)
            for backend in ("flashinfer_trtllm", "flashinfer_cutlass"):
                layer = mxfp8_linear(*own[0].shape, backend)
                load_mxfp8(layer, *own)
                layer.quant_method.process_weights_after_loading(layer)
                error = (layer(x)[0].double() - expected).norm() / expected.norm()
                worst = max(worst, error.item())
        self.assertEqual(len(seen), 210)
        print(f"largest relative error of a linear layer: {worst:.5f}")
        self.assertLess(worst, 2**-8)


if __name__ == "__main__":
    unittest.main()
