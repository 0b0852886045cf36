"""What the MXFP8 tests share: parallel state, models, servers, checkpoints, references.

Imports within a function are of what sglang 0.5.23 lacks.
"""

import contextlib
import copy
import functools
import io
import json
import os
import socket
import sys
import tempfile
import time
import unittest
from random import Random
from types import SimpleNamespace
from typing import Callable, Dict, List, Optional, Sequence, Tuple
from unittest import mock

import requests
import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config, LlamaConfig, LlamaForCausalLM

import sglang
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.fp8_utils import Fp8GemmRunnerBackend
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize, quantize
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import MultiprocessingSerializer, kill_process_tree
from sglang.test.test_utils import (
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    CustomTestCase,
    popen_launch_server,
)


def is_release(version: str) -> bool:
    return sglang.__version__.partition("+")[0] == version


def only_on(version: str) -> Callable:
    """Marks a test that holds for one release of sglang alone."""
    return unittest.skipUnless(is_release(version), f"this is not sglang {version}")


def init_single_process_parallel_state() -> None:
    """Real process groups (gloo) of size one, for layers that ask for their rank."""
    if is_release("0.5.9"):
        init_parallel_state(rank=0, size=1, port=0)
    else:
        from sglang.test.layer_ut_utils import init_single_process_dist

        init_single_process_dist(free_port())


def init_parallel_state(rank: int, size: int, port: int) -> None:
    """Real process groups (gloo) for tensor parallelism over `size` processes."""
    if parallel_state.model_parallel_is_initialized():
        return
    parallel_state.init_distributed_environment(
        world_size=size,
        rank=rank,
        local_rank=rank,
        backend="gloo",
        distributed_init_method=f"tcp://127.0.0.1:{port}",
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=size, backend="gloo"
    )


@contextlib.contextmanager
def fp8_gemm_backend(name: str, emulation: bool = True):
    """Serve as with `--fp8-gemm-backend name`, with emulation of missing kernels."""
    backend = Fp8GemmRunnerBackend(name)
    with mock.patch.object(fp8_utils, "FP8_GEMM_RUNNER_BACKEND", backend):
        with envs.SGLANG_MXFP8_EMULATION.override(emulation):
            yield


@contextlib.contextmanager
def as_on_a_gpu():
    """Models take none of their branches for CPUs, which pad layers and lack biases, and
    may have MXFP8 experts. Whatever has been imported before, and in which order."""
    with contextlib.ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            is_asked = name.startswith("sglang.") and "rotary" not in name
            if is_asked and getattr(module, "_is_cpu", False):
                patches.enter_context(mock.patch.object(module, "_is_cpu", False))
        patches.enter_context(mock.patch.object(Fp8Config, "_require_mxfp8_experts"))
        patches.enter_context(fp8_gemm_backend("auto"))
        yield


def mxfp8_config(serialized: bool = True, **kwargs) -> Fp8Config:
    """The config of an MXFP8 checkpoint, or of `--quantization mxfp8`."""
    return Fp8Config(is_checkpoint_fp8_serialized=serialized, use_mxfp8=True, **kwargs)


def for_random(times: int, **choices: Sequence) -> Callable:
    """Run a test for `times` random picks of its arguments, the same each time."""

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def run(self):
            random = Random(0)
            for _ in range(times):
                case = {name: random.choice(values) for name, values in choices.items()}
                with self.subTest(**case):
                    test(self, **case)

        return run

    return decorate


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of two contiguous tensors, whatever their shapes and dtypes."""
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def random_mxfp8(
    n: int, k: int, seed: int = 0
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random weight with scales that differ by group: bf16, e4m3 [n, k], [n, k/32]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    exponents = torch.randint(-6, 3, (n, k // 32), generator=generator)
    weight = (weight * torch.exp2(exponents).repeat_interleave(32, 1)).bfloat16()
    return weight, *quantize(weight)


def reference_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, quantize_input=True
) -> torch.Tensor:
    """x @ dequantized(weight).T in float64, with x through MXFP8 as the kernels do."""
    if quantize_input:
        x = dequantize(*quantize(x.reshape(-1, x.shape[-1]))).view(x.shape)
    return x.double() @ dequantize(weight, scale).double().t()


def mxfp8_linear(
    n,
    k: int,
    backend="flashinfer_trtllm",
    cls=ReplicatedLinear,
    serialized=True,
    **more,
):
    """A linear [N, K] as a model on that backend builds it; `n` may be the widths of a
    merged one, `more` is the class's."""
    init_single_process_parallel_state()
    arguments = dict(
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=mxfp8_config(serialized),
        prefix="m.proj",
    )
    if cls is MergedColumnParallelLinear:
        arguments.update(tp_rank=0, tp_size=1)
    with fp8_gemm_backend(backend):
        return cls(k, n, **{**arguments, **more})


def load_mxfp8(layer, weight: torch.Tensor, scale: torch.Tensor, *shard_id) -> None:
    """Write both through the parameters' loaders."""
    layer.weight.weight_loader(layer.weight, weight, *shard_id)
    layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *shard_id)


def loaded_mxfp8_linear(*args, seed: int = 0, **kwargs):
    """A random `mxfp8_linear` in kernel form, with its e4m3 weight and its scale."""
    layer = mxfp8_linear(*args, **kwargs)
    _, weight, scale = random_mxfp8(*layer.weight.shape, seed)
    load_mxfp8(layer, weight, scale)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, weight, scale


def assert_product(
    output, x, weight, scale, bias: Optional[torch.Tensor] = None, quantize_input=True
) -> None:
    """`output` is x @ W.T + bias in x's dtype: no further from float64 than its own
    rounding, that of the bias and that of sums in fp32."""
    expected = reference_linear(x, weight, scale, quantize_input)
    rounded = expected.abs()
    if bias is not None:
        expected, rounded = expected + bias, rounded + 2 * bias.abs()
    row_norms = dequantize(weight, scale).double().norm(dim=1)
    sums = 1e-6 * x.double().norm(dim=-1, keepdim=True) * row_norms
    limit = torch.finfo(x.dtype).eps * rounded + sums.view(expected.shape)
    assert output.dtype == x.dtype, output.dtype
    assert output.shape == expected.shape, output.shape
    is_right = (output.double() - expected).abs() <= limit  # False for NaN
    wrong = is_right.logical_not().nonzero().tolist()
    assert not wrong, f"{len(wrong)} of {output.numel()} differ, first {wrong[0]}"


def assert_multiplies(layer, x, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """The layer's output for x is that of a weight and its scale."""
    weight_only = layer.mxfp8_weights.backend.is_weight_only()
    assert_product(layer(x)[0], x, weight, scale, layer.bias, not weight_only)


# hidden 512, so that qkv, o and gate_up fit trtllm, gate_up with a padded scale (N 1088);
# down's K of 544 leaves it to cutlass, with padding in both dimensions.
TINY_LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=512,
    intermediate_size=544,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    vocab_size=320,
    torch_dtype="bfloat16",
    initializer_range=0.05,
    bos_token_id=1,
    eos_token_id=2,
    quantization_config=dict(
        quant_method="mxfp8",
        activation_scheme="dynamic",
        weight_block_size=[1, 32],
        scale_fmt="ue8m0",
    ),
)


def tiny_llama_tensors(seed: int = 0, **changes) -> Dict[str, torch.Tensor]:
    """Random MXFP8 checkpoint tensors of a model with config TINY_LLAMA and `changes`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mxfp8_state(LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})))


def deepseek_v3(**changes) -> DeepseekV3Config:
    """DeepSeek-V3's config, with what sglang needs for it, and `changes`."""
    return DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        moe_layer_freq=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        # A CPU's rotary embedding for MLA takes no other.
        rope_scaling=dict(
            type="yarn",
            factor=4.0,
            original_max_position_embeddings=512,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        **{"max_position_embeddings": 2048, **changes},
    )


def write_checkpoint(
    directory: str, tensors: Dict[str, torch.Tensor], **changes
) -> str:
    """Write a checkpoint with config TINY_LLAMA and `changes` (None takes away), without
    a tokenizer."""
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, os.path.join(directory, "model.safetensors"))
    with open(os.path.join(directory, "config.json"), "w") as file:
        config = {**TINY_LLAMA, **changes}
        json.dump({k: v for k, v in config.items() if v is not None}, file)
    return directory


def server_model_config(path: str, device="cpu", **server_args) -> ModelConfig:
    """The config of a model that this process serves from now on, by ServerArgs."""
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    args = ServerArgs(path, device=device, skip_tokenizer_init=True, **server_args)
    set_global_server_args_for_scheduler(args)
    config = ModelConfig.from_server_args(args)
    initialize_dp_attention(args, config)
    return config


def load_on_cpu(
    path: str, quantization: Optional[str] = None, **load_config
) -> torch.nn.Module:
    """Load a model in this process as a CPU server's runner does; `load_config` is
    LoadConfig's. Stay in `fp8_gemm_backend`, before and for as long as it is updated.
    """
    from sglang.srt.layers.quantization.mxfp8.lifecycle import load_served_model

    config = server_model_config(path, quantization=quantization)
    loader = get_model_loader(LoadConfig(**load_config), config)
    dtype = torch.get_default_dtype()
    try:
        return load_served_model(loader, config, DeviceConfig("cpu"))
    finally:
        torch.set_default_dtype(dtype)  # upstream leaves its own when a load fails


def as_served(model: torch.nn.Module, tensors=(), model_config=None):
    """A model of the test's own, loaded: `tensors` through its loader, and prepared."""
    from sglang.srt.layers.quantization.mxfp8.lifecycle import load_served_model

    loader = mock.Mock(load_config=LoadConfig())
    loader.load_model = lambda **_: model.load_weights(tensors) or model
    # No model class is known, so there is no copy to check updates with.
    with envs.SGLANG_MXFP8_ACCEPT_UNCHECKED.override(True):
        return load_served_model(loader, model_config, None)


def without(tensors: Dict[str, torch.Tensor], *parts: str) -> Dict[str, torch.Tensor]:
    """The tensors whose names have none of `parts` in them."""
    return {n: t for n, t in tensors.items() if not any(p in n for p in parts)}


def with_weight_scale(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Scales by the name that ModelOpt and compressed-tensors give them."""
    return {n.replace("_scale_inv", "_scale"): t for n, t in tensors.items()}


def with_e8m0_scales(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Scales of the dtype that torch has for them."""
    return {
        n: t.view(torch.float8_e8m0fnu) if "scale" in n else t
        for n, t in tensors.items()
    }


def with_bf16(tensors: Dict[str, torch.Tensor], *parts: str) -> Dict[str, torch.Tensor]:
    """The weights whose names have any of `parts` in bf16 and without scales."""
    others = without(tensors, *parts)
    changed = without({n: t for n, t in tensors.items() if n not in others}, "scale")
    return others | {n: (t.float() / 448).bfloat16() for n, t in changed.items()}


_FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_FUSED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


def fused_parameters(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Checkpoint tensors by the names, and in the shapes, of sglang's parameters."""
    parts = {}
    for name, tensor in tensors.items():
        fused = ".".join(_FUSED.get(module, module) for module in name.split("."))
        parts.setdefault(fused, []).append(tensor)
    return {
        name: torch.cat([t.view(torch.uint8) for t in own]).view(own[0].dtype)
        for name, own in parts.items()
    }


def write_past_the_loaders(model: torch.nn.Module, named_tensors) -> None:
    """A --custom-weight-loader that copies raw bytes into parameters by name."""
    parameters = dict(model.named_parameters())
    for name, tensor in named_tensors:
        parameters[name].data.copy_(tensor)


def break_the_next_move(model: torch.nn.Module, named_tensors) -> None:
    """A --custom-weight-loader after which no trtllm weight can be rearranged."""
    from sglang.srt.layers.quantization.mxfp8 import weights

    weights.shuffle_rows_ = mock.Mock(side_effect=MemoryError("no room"))


class TinyModelTestCase(CustomTestCase):
    """Models loaded in this process for trtllm, whose kernels are emulated.

    `a` and `b` are the tensors of two checkpoints of a tiny Llama, `path_a` and `path_b`
    their folders.
    """

    @classmethod
    def setUpClass(cls):
        init_single_process_parallel_state()
        cls.enterClassContext(fp8_gemm_backend("flashinfer_trtllm"))
        cls.directory = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.a, cls.b = tiny_llama_tensors(0), tiny_llama_tensors(1)
        cls.path_a, cls.path_b = cls.write(cls.a), cls.write(cls.b)

    @classmethod
    def write(cls, tensors: Dict[str, torch.Tensor], **changes) -> str:
        """A new folder with these tensors and TINY_LLAMA with `changes`."""
        return write_checkpoint(tempfile.mkdtemp(dir=cls.directory), tensors, **changes)

    def assert_serves(self, model: torch.nn.Module, tensors: dict) -> None:
        """The MXFP8 layers multiply by `tensors`; the model gives them all back as bytes."""
        from sglang.srt.layers.quantization.mxfp8.lifecycle import mxfp8_checkpoint_form
        from sglang.srt.layers.quantization.mxfp8.weights import mxfp8_weights_of

        expected = fused_parameters(tensors)
        torch.manual_seed(0)
        for own in mxfp8_weights_of(model):
            weight = expected[f"{own.name}.weight"]
            x = torch.randn(3, weight.shape[1]).bfloat16()
            scale = expected[f"{own.name}.weight_scale_inv"]
            assert_multiplies(own.layer, x, weight, scale)
        with mxfp8_checkpoint_form(model):
            held = dict(model.named_parameters())
            for name, tensor in expected.items():
                self.assertTrue(same_bytes(held[name].data, tensor), name)

    def assert_updates(self, model: torch.nn.Module) -> None:
        """Through the model's loaders to checkpoint b, and to a; nothing moves."""
        addresses = [param.data_ptr() for param in model.parameters()]
        for tensors in self.b, self.a:
            model.load_weights(tensors.items())
            self.assert_serves(model, tensors)
        self.assertEqual([p.data_ptr() for p in model.parameters()], addresses)

    @contextlib.contextmanager
    def refused(self, model: torch.nn.Module, reason: str):
        """What runs within it is refused, and leaves `model` with checkpoint a."""
        with self.assertRaisesRegex(ValueError, reason):
            yield
        self.assert_serves(model, self.a)

    def config_of(self, path: str):
        """What an update from disk asks of the config of a model."""
        settings = dict(revision=None, quantization="mxfp8", hf_config=None)
        return SimpleNamespace(model_path=path, dtype=torch.bfloat16, **settings)

    def refusal_of(self, model, path: str, load_format="auto", **kwargs) -> str:
        """Why `model` is not updated from `path`; "" if it may be."""
        from sglang.srt.layers.quantization.mxfp8 import lifecycle

        refusal = lifecycle.check_mxfp8_disk_update(
            model, self.config_of(path), get_model_loader, path, load_format, **kwargs
        )
        return refusal or ""


def model_runner(model: torch.nn.Module, **attributes):
    """A model runner that has its methods, the model, and nothing else."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    runner = ModelRunner.__new__(ModelRunner)
    runner.model = model
    vars(runner).update(tp_rank=0, tp_size=1, gpu_id=0, device="cpu", **attributes)
    return runner


def mxfp8_state(model: torch.nn.Module, quantize=quantize) -> Dict[str, torch.Tensor]:
    """Checkpoint tensors of a transformers model, all of its linears but the head in
    MXFP8."""
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    quantized = {f"{name}.weight" for name in linears if name != "lm_head"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in quantized:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensor)
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tensors[name] = tensor.bfloat16()
    return tensors


def as_reference(model: torch.nn.Module, tensors: Dict[str, torch.Tensor]):
    """Give a transformers model a checkpoint's dequantized tensors, and its MXFP8 linears
    quantized inputs, as the kernels have them; not kv_b_proj, which MLA absorbs."""
    scales = {n.removesuffix("_scale_inv"): n for n in tensors if "_scale_inv" in n}
    state = {
        name: dequantize(t, tensors[scales[name]]) if name in scales else t.float()
        for name, t in tensors.items()
        if name not in scales.values()
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()

    def quantize_input(_, inputs):
        x = inputs[0]
        values = dequantize(*quantize(x.reshape(-1, x.shape[-1])))
        return values.view(x.shape).to(x.dtype)

    for name, module in model.named_modules():
        if f"{name}.weight" in scales and not name.endswith("kv_b_proj"):
            module.register_forward_pre_hook(quantize_input)
    return model.eval()


@torch.no_grad()
def reference_logprobs(model: torch.nn.Module, input_ids: List[int]) -> torch.Tensor:
    """What `prompt_logprobs` should be, by a transformers model."""
    logits = model(torch.tensor([input_ids])).logits[0, :-1].float()
    targets = torch.tensor(input_ids[1:]).unsqueeze(1)
    return logits.log_softmax(-1).gather(1, targets)[:, 0]


def assert_as_close_as_bf16(
    served: torch.Tensor, model: torch.nn.Module, input_ids: List[int], times: float
) -> None:
    """Log probabilities of the last tokens are no further from a transformers model in
    fp32 than `times` what running that in bf16 moves it by."""
    expected = reference_logprobs(model, input_ids)
    in_bf16 = reference_logprobs(copy.deepcopy(model).bfloat16(), input_ids)
    bf16_error = (in_bf16 - expected).abs().mean()
    error = (served - expected[-len(served) :]).abs().mean()
    print(
        f"mean |logprob - transformers fp32|: served {error:.3f}, "
        f"transformers bf16 {bf16_error:.3f}; mean logprob: served "
        f"{served.mean():.3f}, transformers fp32 {expected.mean():.3f}"
    )
    assert error < times * bf16_error, (error, bf16_error)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class CpuServer:
    """A real server on the CPU that emulates the MXFP8 kernels and runs within its
    context; `log` is what it prints. Raises when it stops before it is healthy."""

    def __init__(
        self, model: str, *args: str, backend="flashinfer_trtllm", env=None
    ) -> None:
        self.url, self.log = f"http://127.0.0.1:{free_port()}", io.StringIO()
        self._model, self._env = model, env or {}
        # No kernel of sglang's own, and little memory and idle work.
        self._args = (
            "--attention-backend torch_native --sampling-backend pytorch".split()
        )
        self._args += "--disable-overlap-schedule --max-total-tokens 4096".split()
        self._args += ["--sleep-on-idle", "--fp8-gemm-backend", backend, *args]
        # Without a CUDA device tensors travel by file.
        torch.multiprocessing.set_sharing_strategy("file_system")

    def __enter__(self) -> "CpuServer":
        # popen_launch_server starts whatever python3 comes first.
        path = [os.path.dirname(sys.executable), os.environ["PATH"]]
        sleep = time.sleep
        # Upstream's own asks for its health every ten seconds.
        with mock.patch.object(time, "sleep", lambda seconds: sleep(min(seconds, 0.5))):
            self.process = popen_launch_server(
                self._model,
                self.url,
                timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
                other_args=self._args,
                env={
                    "PATH": os.pathsep.join(path),
                    "SGLANG_USE_CPU_ENGINE": "1",
                    "SGLANG_MXFP8_EMULATION": "1",
                    "TORCHDYNAMO_DISABLE": "1",
                    # Not HF_HUB_OFFLINE, which makes popen_launch_server try twice.
                    "TRANSFORMERS_OFFLINE": "1",
                    **self._env,
                },
                return_stdout_stderr=(self.log, self.log),
                device="cpu",
            )
        return self

    def __exit__(self, *_) -> None:
        kill_process_tree(self.process.pid)

    def post(self, path: str, **body) -> dict:
        """The server's answer, as JSON."""
        return requests.post(f"{self.url}{path}", json=body, timeout=120).json()

    def logprobs(self, input_ids: List[int]) -> torch.Tensor:
        """Log probability of each prompt token but the first."""
        answer = self.post(
            "/generate",
            input_ids=input_ids,
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
        tokens = answer["meta_info"]["input_token_logprobs"]
        return torch.tensor([token[0] for token in tokens[1:]])

    def update_from_disk(self, path: str) -> dict:
        self._wait_until_idle()
        return self.post("/update_weights_from_disk", model_path=path)

    def update_from_tensor(self, tensors, load_format: Optional[str] = None) -> dict:
        """`tensors` by name, or what a load format has in their place."""
        serialized = MultiprocessingSerializer.serialize(tensors, output_str=True)
        body = dict(serialized_named_tensors=[serialized], load_format=load_format)
        with self._update_session():
            return self.post("/update_weights_from_tensor", **body)

    @contextlib.contextmanager
    def _update_session(self):
        """What updates in memory have to come within, after 0.5.9."""
        if is_release("0.5.9"):
            yield
        else:
            self._wait_until_idle()
            assert self.post("/begin_weight_update")["success"]
            yield
            assert self.post("/end_weight_update")["success"]

    def _wait_until_idle(self) -> None:
        """After 0.5.9 an update fails beside a request that has just been answered."""
        for _ in range(200):
            flushed = is_release("0.5.9") or requests.post(f"{self.url}/flush_cache")
            if flushed:
                return
            time.sleep(0.05)
