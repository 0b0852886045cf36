"""Whether trtllm's activation scales are 8x4 or 128x4, by the layer's shape and M.

The rule, and the tables that tune_mxfp8_layout.py measures, which may name a backend, too.
"""

import importlib.metadata
import json
import logging
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, Mapping, Optional, Tuple

logger = logging.getLogger(__name__)

ANY_M = 2**31 - 1
# Where 8x4 activation scales are faster, by `max_m_8x4`.
MAX_N_8X4, MAX_M_8X4 = 2560, 128
SF_LAYOUTS = ("auto", "8x4", "128x4")
TUNED_BACKENDS = ("flashinfer_trtllm", "flashinfer_cutlass")
CONFIG_DIR = os.path.join(
    os.path.dirname(os.path.dirname(__file__)), "configs", "mxfp8"
)


@dataclass(frozen=True)
class TunedLayer:
    """What was measured to be fastest for one shape on one GPU.

    Attributes:
        max_m_8x4: the largest M for which the 8x4 activation-scale layout was faster.
        backend: the flag's name for that of the layer, or None to leave it to the flag.
    """

    max_m_8x4: int
    backend: Optional[str] = None


def flashinfer_version() -> Optional[str]:
    try:
        return importlib.metadata.version("flashinfer_python")
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_sf_layout(text: str) -> str:
    """SGLANG_MXFP8_TRTLLM_SF_LAYOUT, or ValueError."""
    if text not in SF_LAYOUTS:
        raise ValueError(
            f"SGLANG_MXFP8_TRTLLM_SF_LAYOUT={text!r} is none of {', '.join(SF_LAYOUTS)}"
        )
    return text


def max_m_8x4(n: int, sf_layout: str, tuned: Optional[TunedLayer]) -> int:
    """The largest M for which the activation scales of a trtllm layer [N, K] are 8x4.

    By default MAX_M_8X4 for N <= MAX_N_8X4 and 0 otherwise: on a GB200, 8x4 was faster for
    (N, K) = (2304, 8192) and (2560, 8192) up to M = 128, and 128x4 for N >= 8192 at every
    M (vllm-project/vllm#52275). Between 2560 and 8192 nothing is published, and sglang's
    128x4 stays.
    """
    # FlashInfer then expects the weight's scale in the 8x4 layout's length.
    if n % 128 != 0 or sf_layout == "128x4":
        return 0
    if sf_layout == "8x4":
        return ANY_M
    if tuned:
        return tuned.max_m_8x4
    return MAX_M_8X4 if n <= MAX_N_8X4 else 0


def config_file(device_name: str) -> str:
    """Name of the file that holds the tuned table of a GPU."""
    return f"device_name={device_name.replace(' ', '_')}.json"


@lru_cache(maxsize=None)
def tuned_layers(
    directory: str, device_name: str, flashinfer: Optional[str]
) -> Mapping[Tuple[int, int], TunedLayer]:
    """The table that tune_mxfp8_layout.py measured on this GPU, by (N, K).

    Empty without one; a wrong or stale one is ignored with a warning.
    """
    path = os.path.join(directory, config_file(device_name))
    if not os.path.exists(path):
        if directory != CONFIG_DIR:
            logger.warning(f"SGLANG_MXFP8_CONFIG_DIR has no {path}")
        return {}
    try:
        with open(path) as file:
            layers = parse_table(json.load(file), device_name, flashinfer)
    except Exception as error:  # whatever a file that is no table raises
        logger.warning(
            f"Ignored the tuned MXFP8 table {path}: {error}. Measure it again with "
            "tune_mxfp8_layout.py, or remove it."
        )
        return {}
    logger.info(f"MXFP8 linear layers of {len(layers)} shapes are tuned by {path}")
    return layers


def parse_table(
    table: dict, device_name: str, flashinfer: Optional[str]
) -> Dict[Tuple[int, int], TunedLayer]:
    """A table of tune_mxfp8_layout.py, by (N, K). Raises ValueError, or what a wrong type
    or a missing key raises, unless it is one of this GPU and FlashInfer version."""
    if table.get("rehearsal"):
        raise ValueError("it is a rehearsal, and measured no kernel of FlashInfer")
    for key, here in (("device_name", device_name), ("flashinfer", flashinfer)):
        if table[key] != here:
            raise ValueError(f"it is for {key} {table[key]!r}, this is {here!r}")
    layers = {}
    for shape, entry in table["layers"].items():
        match = re.fullmatch(r"N=(\d+),K=(\d+)", shape)
        if match is None:
            raise ValueError(f"{shape!r} is not N=...,K=...")
        layer = TunedLayer(**entry)
        if type(layer.max_m_8x4) is not int or layer.max_m_8x4 < 0:
            raise ValueError(f"{shape}: max_m_8x4 is {layer.max_m_8x4!r}")
        if layer.backend not in (None, *TUNED_BACKENDS):
            raise ValueError(f"{shape}: backend is {layer.backend!r}")
        layers[int(match[1]), int(match[2])] = layer
    return layers
