"""What the model that sglang builds for a checkpoint does with its tensors.

To be imported late: it imports sglang, which takes a while and, without a CUDA driver,
stand-ins for its kernels.
"""

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Iterator, List, Sequence
from unittest import mock

import torch
from checkpoint_files import CheckpointError, Tensor


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what sglang, and gloo on file descriptor 1, tell those who serve."""
    level, stdout = logging.root.manager.disable, os.dup(1)
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "wb") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        logging.disable(level)


if not torch.cuda.is_available():
    sys.path.insert(0, str(Path(__file__).resolve().parent / "cpu_stand_ins"))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with _quietly():
    # On a CPU some models cannot be imported, for kernels that are not called here;
    # rotary embeddings can, and elsewhere ask for kernels when they are built.
    import sglang.srt.layers.rotary_embedding  # noqa: F401
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.quantization.mxfp8.names import Layer, ask_model
    from sglang.srt.layers.quantization.mxfp8.numerics import quantize  # noqa: F401
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.server_args import (
        ServerArgs,
        set_global_server_args_for_scheduler,
    )
    from sglang.test.mxfp8_utils import init_single_process_parallel_state, mxfp8_config

    with mock.patch("sglang.srt.utils.is_cpu", lambda: False):
        import sglang.srt.models.registry  # noqa: F401


def quantizable_layers(source: Path, tensors: Sequence[Tensor]) -> List[Layer]:
    """The linears and experts of the checkpoint's model that may be in MXFP8.

    Raises CheckpointError for a model that sglang does not build, or not load.
    """
    try:
        with _quietly():
            return _ask(source, {tensor.name: tensor.shape for tensor in tensors})
    except Exception as error:  # whatever a config, a model's code or its loader raises
        raise CheckpointError(
            f"sglang cannot serve the model in {source}: {type(error).__name__}: {error}"
        ) from error


def _ask(source: Path, shapes: dict) -> List[Layer]:
    init_single_process_parallel_state()
    args = ServerArgs(
        str(source),
        device="cuda" if torch.cuda.is_available() else "cpu",
        attention_backend="fa3",
        skip_tokenizer_init=True,
    )
    set_global_server_args_for_scheduler(args)
    config = ModelConfig.from_server_args(args)
    initialize_dp_attention(args, config)
    # Its loader for CPUs does not take a bias.
    with mock.patch("sglang.srt.layers.moe.fused_moe_triton.layer._is_cpu", False):
        build = _initialize_model, config, LoadConfig(), mxfp8_config()
        names = ask_model(*build, shapes)
    return [layer for layer in names.layers if layer.tensors]
