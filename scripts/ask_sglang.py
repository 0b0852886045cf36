"""What the model that sglang builds for a checkpoint does with its tensors.

sglang is imported here alone: that takes a while and, without a CUDA driver, stand-ins.
"""

import logging
import os
import sys
from pathlib import Path
from typing import List, Sequence

import torch
from checkpoint_files import CheckpointError, Tensor

if not torch.cuda.is_available():
    sys.path.insert(0, str(Path(__file__).resolve().parent / "cpu_stand_ins"))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
try:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.layers.quantization.mxfp8_emulation import quantize  # noqa: F401
    from sglang.srt.layers.quantization.mxfp8_names import Layer, ask_model
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.server_args import (
        ServerArgs,
        set_global_server_args_for_scheduler,
    )
    from sglang.test.mxfp8_utils import init_single_process_parallel_state
except ModuleNotFoundError as error:
    raise CheckpointError(
        f"the patched sglang is not installed here ({error}): run ./scripts/setup.sh"
    ) from error


def quantizable_layers(source: Path, tensors: Sequence[Tensor]) -> List[Layer]:
    """The linears and experts of the checkpoint's model that may be in MXFP8.

    Raises CheckpointError for a model that sglang does not build, or not load.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.getLogger("sglang").setLevel(logging.ERROR)
    init_single_process_parallel_state()
    try:
        args = ServerArgs(
            str(source),
            device=device,
            skip_tokenizer_init=True,
            attention_backend="triton",
        )
        set_global_server_args_for_scheduler(args)
        config = ModelConfig.from_server_args(args)
        initialize_dp_attention(args, config)
        quantization = Fp8Config(is_checkpoint_fp8_serialized=True, use_mxfp8=True)
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        names = ask_model(_initialize_model, config, LoadConfig(), quantization, shapes)
    except Exception as error:  # whatever a config, a model's code or its loader raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"sglang cannot serve the model in {source}: {reason}"
        ) from error
    return [layer for layer in names.layers if layer.tensors]
