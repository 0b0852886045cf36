"""Real servers with MXFP8 models on a CPU: what they answer, against transformers.

FlashInfer's kernels are emulated. The real model is named by MXFP8_TEST_MODEL: an MXFP8
checkpoint of SmolLM2-135M-Instruct, with trtllm and cutlass layers.
"""

import os
import tempfile
import unittest

import openai
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    TINY_LLAMA,
    CpuServer,
    as_reference,
    assert_as_close_as_bf16,
    load_mxfp8,
    mxfp8_linear,
    only_on,
    reference_linear,
    reference_logprobs,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=90, suite="default")

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


# Layers are compared one by one on 0.5.23, whose log is another.
@only_on("0.5.9")
class TestTinyModel(CustomTestCase):
    # gate_up has N = 3072, which the rule leaves to 128x4; the others are narrow.
    sizes = dict(intermediate_size=1536, vocab_size=512)

    @classmethod
    def setUpClass(cls):
        directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.tensors = tiny_llama_tensors(**cls.sizes)
        path = write_checkpoint(directory, cls.tensors, **cls.sizes)
        cls.args = path, "--skip-tokenizer-init"

    def test_both_scale_layouts_of_trtllm(self):
        """Of a long prompt all scales are 128x4; of a short one those of narrow layers
        are 8x4."""
        config = LlamaConfig(**{**TINY_LLAMA, **self.sizes})
        reference = as_reference(LlamaForCausalLM(config), self.tensors)
        with CpuServer(*self.args) as server:
            self.assertRegex(
                server.log.getvalue(),
                r"6 on flashinfer_trtllm, 8x4 scales up to M = 128 .*"
                r"2 on flashinfer_trtllm, 128x4 scales .gate_up_proj .3072, 512",
            )
            for m in (300, 40):
                prompt = [(7 * i) % 500 + 3 for i in range(m)]
                served = server.logprobs(prompt)
                assert_as_close_as_bf16(served, reference, prompt, times=1.2)

    def test_what_is_refused_at_start_stops_a_server(self):
        server = CpuServer(*self.args, env={"SGLANG_MXFP8_EMULATION": "0"})
        with self.assertRaisesRegex(Exception, "exited"), server:
            pass
        message = "a device without CUDA.*SM100 or SM103.*SGLANG_MXFP8_EMULATION=1"
        self.assertRegex(server.log.getvalue(), message)


if __name__ == "__main__":
    unittest.main()
