"""What this repository says of itself: links, pins, a table, mutations."""

import re
import tomllib
from pathlib import Path

import mutation_check
import pytest
import torch

from sglang.srt.layers.quantization.mxfp8 import routing

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

ROUTED = re.findall(
    r"(?m)^\| .* \| \[\d+, \d+\] \|.*$", (ROOT / "docs/serving.md").read_text()
)


def anchors(page: Path) -> set:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall("(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def pins(file: str) -> dict:
    text = (ROOT / "requirements" / file).read_text()
    found = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", text)
    return {name.lower().replace("_", "-"): version for name, version in found}


@pytest.mark.parametrize("folder, of", [("", ""), ("releases/0.5.23", "-0.5.23")])
def test_requirements_hold_what_the_release_and_the_other_files_ask_for(folder, of):
    config = tomllib.loads((ROOT / folder / "upstream.toml").read_text())
    wanted = {n.replace("_", "-"): new for n, (_, new) in config["requires"].items()}
    lock = pins(f"lock{of}.txt")
    assert wanted.items() <= lock.items()
    assert wanted == (pins("overrides.txt") if not of else {})
    assert pins(f"serve{of}.in")["sglang"] == config["release"]["version"]
    assert pins("tools.txt").items() <= lock.items()
    assert "sglang" not in lock


@pytest.mark.parametrize("row", ROUTED)
def test_rows_of_the_routing_table_are_what_the_code_decides(row):
    """For a bf16 model on SM100 without overrides or a tuned table."""
    name, n, k = re.match(r"\| (.*) \| \[(\d+), (\d+)\] \|", row).groups()
    runs = routing.TRTLLM, routing.CUTLASS, routing.TRITON, routing.WEIGHT_ONLY
    choices = [
        routing.select_mxfp8_linear_backend(
            routing.Mxfp8LinearOptions(preferred, runs), int(n), int(k), torch.bfloat16
        )
        for preferred in runs[:3]
    ]
    first, *backends = (c.backend.value.removeprefix("flashinfer_") for c in choices)
    up_to = choices[0].max_m_8x4
    scale = f"8x4 up to M = {up_to}, then 128x4" if up_to else "128x4"
    scale = "none" if first == "weight_only" else scale
    cells = name, f"[{n}, {k}]", first, scale, *backends, choices[0].reason
    assert row == f"| {' | '.join(cells)} |"


def test_each_mutation_fits_the_installed_code_once():
    assert mutation_check.main(["--fit"]) == 0
