"""What ModelOpt and compressed-tensors write, sglang loads, byte for byte."""

import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from checkpoints import read_config, read_tensors, save_tiny_llama, write
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

from sglang.srt.layers.quantization.mxfp8.lifecycle import mxfp8_checkpoint_form
from sglang.srt.layers.quantization.mxfp8.numerics import quantize
from sglang.srt.layers.quantization.mxfp8.weights import mxfp8_weights_of
from sglang.test.mxfp8_utils import (
    fp8_gemm_backend,
    fused_parameters,
    init_single_process_parallel_state,
    load_on_cpu,
    same_bytes,
)

# Kept in bf16: a whole block, and one linear.
KEPT = ["model.layers.0.self_attn.", "model.layers.1.mlp.down_proj"]


def write_by_modelopt(model: torch.nn.Module, path: Path) -> None:
    mtq.quantize(model, copy.deepcopy(mtq.MXFP8_DEFAULT_CFG))
    for name in KEPT:
        mtq.disable_quantizer(model, f"{name}*")
    export_hf_checkpoint(model, export_dir=path)


def write_by_older_modelopt(model: torch.nn.Module, path: Path) -> None:
    """With hf_quant_config.json alone."""
    write_by_modelopt(model, path)
    config = read_config(path)
    del config["quantization_config"]
    write(path, read_tensors(path), config)


def write_by_compressed_tensors(model: torch.nn.Module, path: Path) -> None:
    ignore = ["lm_head", *(f"re:{name}.*" for name in KEPT)]
    preset = QuantizationConfig(config_groups={"MXFP8": ["Linear"]}, ignore=ignore)
    apply_quantization_config(model, preset)
    for linear in model.modules():
        if hasattr(linear, "weight_scale"):
            groups = linear.weight.detach().unflatten(1, (-1, 32))
            scale, _ = calculate_qparams(
                groups.amin(-1), groups.amax(-1), linear.quantization_scheme.weights
            )
            linear.weight_scale.data.copy_(scale)
            linear.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)


WRITERS = write_by_modelopt, write_by_older_modelopt, write_by_compressed_tensors


@pytest.mark.parametrize("write_model", WRITERS)
def test_sglang_holds_its_bytes_which_are_ours(write_model, tmp_path):
    """But for compressed-tensors' scale, which is twice ours where amax is 448 * 2^n."""
    source, path = tmp_path / "source", tmp_path / "written"
    save_tiny_llama(source, tie_word_embeddings=False)
    write_model(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), path)
    tensors, originals = read_tensors(path), read_tensors(source)
    doubled = 0
    for name, original in originals.items():
        if f"{name}_scale" not in tensors:
            assert same_bytes(tensors[name], original)
            continue
        values, scale = quantize(original)
        amax = original.float().unflatten(1, (-1, 32)).abs().amax(-1)
        edge = torch.frexp(amax / 448).mantissa == 0.5
        edge &= write_model is write_by_compressed_tensors
        assert torch.equal(tensors[f"{name}_scale"].int(), scale.int() + edge)
        same = ~edge.repeat_interleave(32, dim=1)
        assert torch.equal(tensors[name].float()[same], values.float()[same])
        doubled += int(edge.sum())
    assert (doubled > 0) == (write_model is write_by_compressed_tensors)

    init_single_process_parallel_state()
    with fp8_gemm_backend("flashinfer_trtllm"):
        model = load_on_cpu(str(path))
        names = [weights.name for weights in mxfp8_weights_of(model)]
        assert len(names) == 5 and not any(
            name.startswith(tuple(KEPT)) for name in names
        )
        with mxfp8_checkpoint_form(model):
            held = {n: p.data.clone() for n, p in model.named_parameters()}
    # As sglang puts them together, q before k.
    names = sorted(tensors, key=lambda name: name.replace("q_proj", "a_proj"))
    ours = {name.replace("_scale", "_scale_inv"): tensors[name] for name in names}
    for name, tensor in fused_parameters(ours).items():
        assert same_bytes(held[name], tensor), name
