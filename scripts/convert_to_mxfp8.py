#!/usr/bin/env python3
"""Convert a Hugging Face checkpoint to an MXFP8 checkpoint of sglang's own form.

The model that sglang builds says which weights can be quantized: those of its linears and
experts. Their `weight` [N, K] becomes float8_e4m3fn, with a uint8 `weight_scale_inv`
[N, K/32] beside it. All else stays as it is: what --ignore names, towers for images and
sound, and what MXFP8 cannot hold.

Before anything is written, sglang's own check says whether a server would start on the
result. Files keep their names; memory holds one of them at a time. Exits with 2 and one
line on stderr for what cannot be converted. Needs .venv (./scripts/setup.sh); no GPU.
"""

from in_venv import run_in_venv

if __name__ == "__main__":
    run_in_venv()

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Sequence

from safetensors import SafetensorError


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    try:
        _check_paths(args.input, args.output)
        from mxfp8_conversion import convert

        print(convert(args.input, args.output, args.ignore))
        return 0
    except ImportError as error:
        reason = f"no patched sglang here ({error}): run ./scripts/setup.sh"
    except (ValueError, OSError, SafetensorError) as error:
        reason = str(error)
    print(f"convert_to_mxfp8: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("input", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument("output", type=Path, help="directory to create")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="GLOB",
        help="keep matching linears as they are, e.g. '*.down_proj' or "
        "'model.layers.0.*' (module names, without .weight; repeatable)",
    )
    return parser.parse_args(argv)


def _check_paths(source: Path, output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} is there already: choose another output")
    if source.resolve() in output.resolve().parents:
        raise ValueError(f"{output} lies inside {source}: choose another output")


if __name__ == "__main__":
    # Nothing but our own lines on stdout and stderr; gloo writes on descriptor 1.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main())
