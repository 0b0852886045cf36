"""What the MXFP8 tests share: parallel state, servers, random checkpoints, references."""

import contextlib
import os
import sys
from typing import List, Optional, TextIO, Tuple
from unittest import mock

import requests
import torch

from sglang.srt.distributed import parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.fp8_utils import Fp8GemmRunnerBackend
from sglang.srt.layers.quantization.mxfp8_emulation import dequantize, quantize
from sglang.test.test_utils import (
    DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH,
    popen_launch_server,
)


def init_single_process_parallel_state() -> None:
    """Real process groups (gloo) of size one, for layers that ask for their rank."""
    if parallel_state.model_parallel_is_initialized():
        return
    parallel_state.init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        backend="gloo",
        distributed_init_method="tcp://127.0.0.1:0",
    )
    parallel_state.initialize_model_parallel(backend="gloo")


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
