#!/usr/bin/env python3
"""Writes the table of which layer goes where into docs/serving.md, from the code that decides.

Needs the .venv that ./scripts/setup.sh makes.
"""

import argparse
import importlib.util
from pathlib import Path

from in_venv import run_in_venv

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    if importlib.util.find_spec("sglang") is None:
        run_in_venv()

import torch

from sglang.srt.layers.quantization.mxfp8.routing import (
    CUTLASS,
    TRITON,
    TRTLLM,
    WEIGHT_ONLY,
    Mxfp8LinearOptions,
    select_mxfp8_linear_backend,
)

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
BEGIN, END = "<!-- scripts/routing_table.py: begin -->", "<!-- end -->"
LAYERS = (
    ("Qwen3-8B qkv", 6144, 4096),
    ("Qwen3-8B gate_up, TP 8", 3072, 4096),
    ("Qwen3-8B qkv, TP 8", 768, 4096),
    ("Llama-70B qkv, TP 8", 1280, 8192),
    ("Llama-70B down, TP 8", 8192, 3584),
    ("DeepSeek-V3 fused_qkv_a", 2112, 7168),
    ("SmolLM2-135M down", 576, 1536),
    ("SmolLM2-135M gate_up", 3072, 576),
    ("a narrow layer", 96, 4096),
    ("an odd layer", 1000, 4096),
)
HEAD = (
    "| layer | [N, K] of a rank | `auto`, `flashinfer_trtllm` | its activation scale | "
    "`flashinfer_cutlass` | `triton` | why not the first |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def table() -> str:
    """Markdown, for a bf16 model on SM100 without overrides or a tuned table."""
    return "\n".join([HEAD, *(_row(*layer) for layer in LAYERS)])


def _row(name: str, n: int, k: int) -> str:
    choices = [
        select_mxfp8_linear_backend(
            Mxfp8LinearOptions(preferred, (TRTLLM, CUTLASS, TRITON, WEIGHT_ONLY)),
            *(n, k, torch.bfloat16),
        )
        for preferred in (TRTLLM, CUTLASS, TRITON)
    ]
    trtllm, up_to = choices[0], choices[0].max_m_8x4
    scale = f"8x4 up to M = {up_to}, then 128x4" if up_to else "128x4"
    backends = [choice.backend.value.removeprefix("flashinfer_") for choice in choices]
    cells = [
        name,
        f"[{n}, {k}]",
        backends[0],
        "none" if trtllm.backend == WEIGHT_ONLY else scale,
    ]
    return f"| {' | '.join([*cells, *backends[1:], trtllm.reason])} |"


def rewritten(page: str) -> str:
    """`page` with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
