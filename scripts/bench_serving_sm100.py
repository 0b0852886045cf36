#!/usr/bin/env python3
"""Measure sglang's MXFP8 backends on an SM100 or SM103 GPU, or rehearse it on a CPU.

    bench_serving_sm100.py --model MODEL [--tp N] [RESULTS] [-- SERVER ARGUMENT...]
    bench_serving_sm100.py --rehearse [RESULTS]

For each backend a real server is launched, warmed up, measured by sglang's bench_serving
in a prefill-heavy and a decode-heavy case at several concurrencies, updated from disk, and
asked GSM8K's questions; the backends take turns over the repeats. Then the kernels alone
are measured, and a report with plots is written. Everything is kept in RESULTS.

Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from serving.backends import EMULATED, SERVERS

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
REHEARSAL_MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct-MXFP8"


def parse_arguments() -> argparse.Namespace:
    own, server = split(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results",
        nargs="?",
        type=Path,
        help="folder (default: .cache/evidence/ and the model's name, or rehearsal)",
    )
    parser.add_argument("--model", help="an MXFP8 checkpoint: its folder or its name")
    parser.add_argument("--tp", type=positive, default=1, help="GPUs of one server")
    parser.add_argument("--repeats", type=positive, help="default: 3, rehearsed once")
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=list(SERVERS),
        metavar="NAME",
        help=f"default: all of {', '.join(SERVERS)}",
    )
    parser.add_argument(
        "--concurrency", nargs="+", type=positive, help="default: 1 8 32 128 512"
    )
    parser.add_argument(
        "--gsm8k",
        type=Path,
        metavar="FILE",
        help="GSM8K's test.jsonl (default: downloaded)",
    )
    parser.add_argument("--port", type=port, help="the servers' (default: a free one)")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="all of it on the CPU with a small model, the kernels emulated: finds "
        "mistakes, and says nothing about speed",
    )
    args = parser.parse_args(own)
    args.server_arguments = server
    problem = argument_problem(args)
    if problem:
        parser.error(problem)
    return args


def split(arguments: list) -> tuple:
    """What comes before `--`, and what comes after it."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise ValueError(text)
    return value


def argument_problem(args: argparse.Namespace) -> str:
    """What is wrong with the arguments, as far as nothing needs to be run, or ""."""
    backends = args.backends or []
    if args.rehearse and (args.model or args.tp != 1):
        return "--rehearse has its own model and one server process: no --model, --tp"
    if not args.rehearse and not args.model:
        return "--model is needed, or --rehearse to try it all on a CPU"
    if args.rehearse and not set(backends) <= set(EMULATED):
        return "--rehearse: triton's MXFP8 kernel has no emulation; leave it out"
    if len(set(backends)) != len(backends):
        return "--backends: each name once"
    if args.gsm8k and not args.gsm8k.is_file():
        return f"--gsm8k: {args.gsm8k} is no file"
    for name in ("--host", "--port", "--model-path", "--tp", "--fp8-gemm-backend"):
        if any(a.split("=")[0] == name for a in args.server_arguments):
            return f"{name} cannot be given to the servers: it is set for them"
    return model_problem(args.model, args.server_arguments) if args.model else ""


def model_problem(model: str, server_arguments: list) -> str:
    """Why a folder is no MXFP8 checkpoint, or ""; a name is left to the server."""
    config = Path(model) / "config.json"
    if not config.is_file():
        is_path = Path(model).exists() or model[0] in "/.~"
        return f"--model: {model} has no config.json" if is_path else ""
    texts = [config, config.with_name("hf_quant_config.json")]
    text = "".join(path.read_text() for path in texts if path.is_file())
    if "mxfp8" not in text.lower() and "--quantization" not in server_arguments:
        return (
            f"--model: {model} is not in MXFP8; convert it with "
            "scripts/convert_to_mxfp8.py, or add -- --quantization mxfp8"
        )
    return ""


def set_up(rehearse: bool) -> None:
    """Go on in .venv, made or updated first, unless this Python has the patched sglang."""
    steps = [] if has_patched_sglang() else ["setup"]
    if rehearse:
        steps += ["ensure_uv", "get_default_model"]
    if steps:
        script = f'source "$1"; {"; ".join(steps)}'
        command = ["bash", "-c", script, "set-up", str(ROOT / "scripts" / "setup.sh")]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit("bench_serving_sm100.py: the set-up failed; see above")
    if "setup" in steps:
        python = str(VENV / "bin" / "python")
        os.execv(python, [python, *sys.argv])


def has_patched_sglang() -> bool:
    try:
        return "+mxfp8" in importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return False


def main() -> int:
    args = parse_arguments()
    set_up(args.rehearse)
    # Needs what the set-up installs.
    from serving.session import run

    args.model = args.model or str(REHEARSAL_MODEL)
    return run(args, ROOT)


if __name__ == "__main__":
    sys.exit(main())
