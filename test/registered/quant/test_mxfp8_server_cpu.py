"""A real server with a real MXFP8 model on a CPU, against Hugging Face transformers.

FlashInfer's kernels are emulated. The model is named by MXFP8_TEST_MODEL: an MXFP8
checkpoint of SmolLM2-135M-Instruct, with trtllm and cutlass layers.
"""

import io
import os
import tempfile
import unittest

import openai
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize, quantize
from sglang.srt.utils import kill_process_tree
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    init_single_process_parallel_state,
    launch_cpu_server,
    mxfp8_config,
    prompt_logprobs,
    tiny_llama_tensors,
    write_checkpoint,
)
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=240, suite="default")

MODEL = os.environ.get("MXFP8_TEST_MODEL", "")
TEXT = (
    "The water cycle moves water between the oceans, the air and the land. The sun "
    "heats the sea, and water rises as vapour. High in the air it cools, and clouds "
    "form. Rain and snow bring the water back to the ground, where rivers carry it to "
    "the sea again. In winter, some of it stays on the mountains as ice for months."
)


class QuantizedInputLinear(torch.nn.Module):
    """A linear layer whose input goes through MXFP8, as the kernels' does."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.seen = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        x_2d = dequantize(*quantize(x.reshape(-1, x.shape[-1])))
        return (x_2d.view(x.shape) @ self.weight.float().t()).to(x.dtype)


def transformers_model(tensors: dict, dtype: torch.dtype) -> LlamaForCausalLM:
    """The checkpoint in transformers: dequantized weights, quantized activations."""
    config = AutoConfig.from_pretrained(MODEL)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    scales = {n: t for n, t in tensors.items() if n.endswith("_scale_inv")}
    weights = {
        n: (
            dequantize(t, scales[f"{n}_scale_inv"])
            if f"{n}_scale_inv" in scales
            else t.float()
        )
        for n, t in tensors.items()
        if n not in scales
    }
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    model.to(dtype).eval()
    for name, module in list(model.named_modules()):
        if f"{name}.weight_scale_inv" in scales:
            parent = model.get_submodule(name.rpartition(".")[0])
            linear = QuantizedInputLinear(module.weight.data)
            setattr(parent, name.rpartition(".")[2], linear)
    return model


@torch.no_grad()
def transformers_logprobs(model: LlamaForCausalLM, input_ids: list) -> torch.Tensor:
    logits = model(torch.tensor([input_ids])).logits[0, :-1].float()
    targets = torch.tensor(input_ids[1:]).unsqueeze(1)
    return logits.log_softmax(-1).gather(1, targets)[:, 0]


class MXFP8ServerBase:
    """The real model through the backend that subclasses name."""

    base_url = "http://127.0.0.1:31873"
    backend: str

    @classmethod
    def setUpClass(cls):
        cls.process = launch_cpu_server(MODEL, cls.base_url, cls.backend)
        cls.tensors = load_file(os.path.join(MODEL, "model.safetensors"))
        cls.input_ids = AutoTokenizer.from_pretrained(MODEL)(TEXT)["input_ids"]
        cls.reference = transformers_model(cls.tensors, torch.float32)
        cls.expected = transformers_logprobs(cls.reference, cls.input_ids)

    @classmethod
    def tearDownClass(cls):
        kill_process_tree(cls.process.pid)

    def test_it_answers(self):
        client = openai.OpenAI(base_url=f"{self.base_url}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of Japan?"}],
            temperature=0,
            max_tokens=32,
        )
        self.assertIn("Tokyo", answer.choices[0].message.content)

    def test_logprobs_differ_from_transformers_no_more_than_bf16_moves_them(self):
        served = prompt_logprobs(self.base_url, self.input_ids)
        in_bf16 = transformers_logprobs(
            transformers_model(self.tensors, torch.bfloat16), self.input_ids
        )
        error = (served - self.expected).abs()
        bf16_error = (in_bf16 - self.expected).abs()
        print(
            f"mean |logprob - transformers fp32|: served {error.mean():.3f}, "
            f"transformers bf16 {bf16_error.mean():.3f}; mean logprob: served "
            f"{served.mean():.3f}, transformers fp32 {self.expected.mean():.3f}"
        )
        self.assertLess(error.mean(), 1.2 * bf16_error.mean())
        self.assertAlmostEqual(
            served.mean().item(), self.expected.mean().item(), delta=0.1
        )

    def test_every_linear_agrees_with_transformers_to_bf16_rounding(self):
        """Each layer alone, on the activations that transformers gives it."""
        init_single_process_parallel_state()
        worst = 0.0
        for name, linear in self.reference.named_modules():
            if not isinstance(linear, QuantizedInputLinear):
                continue
            n, k = linear.weight.shape
            with fp8_gemm_backend(self.backend):
                layer = ReplicatedLinear(
                    k,
                    n,
                    bias=False,
                    params_dtype=torch.bfloat16,
                    quant_config=mxfp8_config(),
                    prefix=name,
                )
            for attribute in ("weight", "weight_scale_inv"):
                parameter = getattr(layer, attribute)
                parameter.weight_loader(parameter, self.tensors[f"{name}.{attribute}"])
            layer.quant_method.process_weights_after_loading(layer)
            x = linear.seen[0].bfloat16()
            output, expected = layer(x)[0].double(), linear(x.float()).double()
            worst = max(worst, ((output - expected).norm() / expected.norm()).item())
        print(f"largest relative error of a linear layer: {worst:.5f}")
        self.assertLess(worst, 2**-8)


@unittest.skipUnless(MODEL, "MXFP8_TEST_MODEL names no checkpoint; see scripts/test.sh")
class TestMXFP8ServerTrtllmCpu(MXFP8ServerBase, CustomTestCase):
    backend = "flashinfer_trtllm"


@unittest.skipUnless(MODEL, "MXFP8_TEST_MODEL names no checkpoint; see scripts/test.sh")
class TestMXFP8ServerCutlassCpu(MXFP8ServerBase, CustomTestCase):
    backend = "flashinfer_cutlass"


class TestBothScaleLayouts(CustomTestCase):
    """A random model, all of whose layers are trtllm's, with both scale layouts.

    Emulated kernels compute the same from either layout and for either backend, so
    another layout in the wrong place shows as another log probability.
    """

    base_url = "http://127.0.0.1:31875"
    # gate_up has N = 3072, which the rule leaves to 128x4; the others are narrow.
    sizes = dict(intermediate_size=1536, vocab_size=512)

    def served(self, path: str, backend: str) -> tuple:
        """Log probabilities of a prompt of 300 tokens and of 5, and the server's log."""
        log = io.StringIO()
        process = launch_cpu_server(
            path, self.base_url, backend, ["--skip-tokenizer-init"], log=log
        )
        try:
            prompts = [[(7 * i) % 500 + 3 for i in range(m)] for m in (300, 5)]
            return [prompt_logprobs(self.base_url, p) for p in prompts], log.getvalue()
        finally:
            kill_process_tree(process.pid)

    def test_trtllm_serves_what_cutlass_serves(self):
        with tempfile.TemporaryDirectory() as path:
            write_checkpoint(path, tiny_llama_tensors(**self.sizes), **self.sizes)
            trtllm, log = self.served(path, "flashinfer_trtllm")
            self.assertRegex(
                log,
                r"6 on flashinfer_trtllm, 8x4 scales up to M = 128 .*"
                r"2 on flashinfer_trtllm, 128x4 scales .gate_up_proj .3072, 512",
            )
            cutlass, log = self.served(path, "flashinfer_cutlass")
            self.assertRegex(log, r"linear layers: 8 on flashinfer_cutlass \(")
            for ours, reference in zip(trtllm, cutlass):
                self.assertTrue(torch.equal(ours, reference))


@unittest.skipUnless(MODEL, "MXFP8_TEST_MODEL names no checkpoint; see scripts/test.sh")
class TestMXFP8ServerRefusals(CustomTestCase):
    base_url = "http://127.0.0.1:31874"

    def fails_with(self, message: str, model: str = MODEL, env=None) -> None:
        log = io.StringIO()
        with self.assertRaisesRegex(Exception, "exited"):
            launch_cpu_server(
                model, self.base_url, "flashinfer_trtllm", env=env, log=log
            )
        self.assertRegex(log.getvalue(), message)

    def test_without_emulation_it_stops_at_start(self):
        self.fails_with(
            "a device without CUDA.*SM100 or SM103.*SGLANG_MXFP8_EMULATION=1",
            env={"SGLANG_MXFP8_EMULATION": "0"},
        )

    def test_a_missing_scale_stops_it_with_the_layers_name(self):
        missing = "model.layers.3.mlp.down_proj.weight_scale_inv"
        with tempfile.TemporaryDirectory() as model:
            for file in os.listdir(MODEL):
                if file != "model.safetensors":
                    os.symlink(os.path.join(MODEL, file), os.path.join(model, file))
            tensors = load_file(os.path.join(MODEL, "model.safetensors"))
            del tensors[missing]
            save_file(tensors, os.path.join(model, "model.safetensors"))
            self.fails_with(f"the checkpoint lacks the scale of .*, {missing}", model)


if __name__ == "__main__":
    unittest.main()
