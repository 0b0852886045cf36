"""What the MXFP8 tests share: parallel state, servers, random checkpoints, references."""

import contextlib
import json
import os
import sys
from typing import Dict, List, Optional, TextIO, Tuple
from unittest import mock

import requests
import torch
from safetensors.torch import save_file

from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.fp8_utils import Fp8GemmRunnerBackend
from sglang.srt.layers.quantization.mxfp8.lifecycle import load_served_model
from sglang.srt.layers.quantization.mxfp8.numerics import dequantize, quantize
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.test_utils import (
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    popen_launch_server,
)


def init_single_process_parallel_state() -> None:
    """Real process groups (gloo) of size one, for layers that ask for their rank."""
    init_parallel_state(rank=0, size=1, port=0)


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


def mxfp8_config(serialized: bool = True, **kwargs) -> Fp8Config:
    """The config of an MXFP8 checkpoint, or of `--quantization mxfp8`."""
    return Fp8Config(is_checkpoint_fp8_serialized=serialized, use_mxfp8=True, **kwargs)


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
    c, generator = {**TINY_LLAMA, **changes}, torch.Generator().manual_seed(seed)
    hidden, inner, kv = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def random(*shape):
        values = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return values.bfloat16()

    tensors = {
        "model.embed_tokens.weight": random(c["vocab_size"], hidden) * 8,
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    for i in range(c["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        for name, shape in linears.items():
            values, scale = quantize(random(*shape))
            tensors[f"model.layers.{i}.{name}.weight"] = values
            tensors[f"model.layers.{i}.{name}.weight_scale_inv"] = scale
    return tensors


def write_checkpoint(
    directory: str, tensors: Dict[str, torch.Tensor], **changes
) -> str:
    """Write a checkpoint with config TINY_LLAMA and `changes`, without a tokenizer."""
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, os.path.join(directory, "model.safetensors"))
    with open(os.path.join(directory, "config.json"), "w") as file:
        json.dump({**TINY_LLAMA, **changes}, file)
    return directory


def load_on_cpu(
    path: str, quantization: Optional[str] = None, **load_config
) -> torch.nn.Module:
    """Load a model in this process as a CPU server's runner does; `load_config` is
    LoadConfig's. Stay in `fp8_gemm_backend`, before and for as long as it is updated.
    """
    args = ServerArgs(
        model_path=path,
        device="cpu",
        skip_tokenizer_init=True,
        quantization=quantization,
    )
    set_global_server_args_for_scheduler(args)
    config = ModelConfig.from_server_args(args)
    initialize_dp_attention(args, config)
    loader = get_model_loader(LoadConfig(**load_config), config)
    dtype = torch.get_default_dtype()
    try:
        return load_served_model(loader, config, DeviceConfig("cpu"))
    finally:
        torch.set_default_dtype(dtype)  # upstream leaves its own when a load fails


def fused_parameters(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Checkpoint tensors by the names, and in the shapes, of sglang's parameters."""
    fused = {}
    for name, tensor in tensors.items():
        for parts, whole in ((_QKV, "qkv_proj"), (_GATE_UP, "gate_up_proj")):
            part = next((p for p in parts if f".{p}." in name), None)
            if part == parts[0]:
                raw = [tensors[name.replace(part, p)].view(torch.uint8) for p in parts]
                fused[name.replace(part, whole)] = torch.cat(raw).view(tensor.dtype)
            if part is not None:
                break
        else:
            fused[name] = tensor
    return fused


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def write_past_the_loaders(model: torch.nn.Module, named_tensors) -> None:
    """A --custom-weight-loader that copies raw bytes into parameters by name."""
    parameters = dict(model.named_parameters())
    for name, tensor in named_tensors:
        parameters[name].data.copy_(tensor)


# The CPU server's flags: no kernel of sglang's own, and little memory.
CPU_SERVER_ARGS = [
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--max-total-tokens", "4096"),
]


def launch_cpu_server(
    model: str,
    base_url: str,
    backend: str,
    other_args: Optional[List[str]] = None,
    env: Optional[dict] = None,
    log: Optional[TextIO] = None,
):
    """A real server on the CPU that emulates the MXFP8 kernels; stop it by its pid.

    What it prints goes to `log` as well. Raises when it stops before it is healthy.
    """
    return popen_launch_server(
        model,
        base_url,
        timeout=DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
        other_args=[
            *CPU_SERVER_ARGS,
            *("--fp8-gemm-backend", backend),
            *(other_args or []),
        ],
        env={
            # popen_launch_server starts whatever python3 comes first.
            "PATH": os.pathsep.join(
                [os.path.dirname(sys.executable), os.environ["PATH"]]
            ),
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_MXFP8_EMULATION": "1",
            "TORCHDYNAMO_DISABLE": "1",
            # Not HF_HUB_OFFLINE, which makes popen_launch_server try twice.
            "TRANSFORMERS_OFFLINE": "1",
            **(env or {}),
        },
        return_stdout_stderr=(log, log) if log else None,
        device="cpu",
    )


def prompt_logprobs(base_url: str, input_ids: List[int]) -> torch.Tensor:
    """Log probability of each prompt token but the first, from the server's /generate."""
    response = requests.post(
        f"{base_url}/generate",
        json={
            "input_ids": input_ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
        timeout=120,
    )
    response.raise_for_status()
    tokens = response.json()["meta_info"]["input_token_logprobs"]
    return torch.tensor([token[0] for token in tokens[1:]])
