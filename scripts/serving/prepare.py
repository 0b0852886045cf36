"""What a session needs before it measures, and whether this machine has it."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import requests
from evidence import Gpu, ResultsError
from serving import machine
from serving.backends import SERVERS
from serving.plan import EMULATION, grid_for

QUESTIONS = "gsm8k.jsonl"
OWN_QUESTIONS = Path("benchmark", "mxfp8", "questions.jsonl")
GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/"
    "grade_school_math/data/test.jsonl"
)
WAY_OUT = "--rehearse runs everything on the CPU, emulated."


def program_environment(
    rehearse: bool, root: Path, environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment of what is started; sglang's own variables come from the plan."""
    env = {k: v for k, v in environ.items() if not k.startswith("SGLANG_")}
    if rehearse:
        stand_ins = str(root / "scripts" / "cpu_stand_ins")
        paths = filter(None, [stand_ins, env.get("PYTHONPATH")])
        env["PYTHONPATH"] = os.pathsep.join(paths)
        env |= {**EMULATION, "CUDA_VISIBLE_DEVICES": ""}
    return env


def check_gpus(
    args: argparse.Namespace, gpus: tuple[Gpu, ...], env: Mapping[str, str]
) -> None:
    """Raises ResultsError unless this machine runs every server that is asked for."""
    if not gpus:
        raise ResultsError(
            f"no NVIDIA GPU is visible, and an SM100 or SM103 one is needed. {WAY_OUT}"
        )
    if args.tp > len(gpus):
        raise ResultsError(f"--tp {args.tp}: only {len(gpus)} GPUs are visible")
    backends = {SERVERS[name][0] for name in args.backends or SERVERS}
    missing = machine.missing_kernels(backends, env)
    if missing:
        lacks = "; ".join(f"{name} needs {what}" for name, what in missing.items())
        raise ResultsError(f"{gpus[0].name} cannot be measured: {lacks}. {WAY_OUT}")


def built_from_another_tree(root: Path) -> bool:
    """Is this root's .venv, and is its sglang of another state of the tree?"""
    stamp = root / ".venv" / ".wheel-stamp"
    if Path(sys.prefix) != root / ".venv" or not stamp.is_file():
        return False
    setup = root / "scripts" / "setup.sh"
    # As setup.sh names what it installs.
    script = 'source "$1"; digest python scripts/overlay scripts/patchset upstream.toml'
    told = subprocess.run(
        ["bash", "-c", script, "digest", str(setup)],
        check=False,
        capture_output=True,
        text=True,
    )
    return told.returncode == 0 and told.stdout != stamp.read_text()


def get_questions(given: Path | None, rehearse: bool, root: Path, folder: Path) -> str:
    """Put the file of questions into the folder, once; returns its name of before.

    Raises ResultsError where it is no such file, or not the one that is there.
    """
    copy = folder / QUESTIONS
    source = given or (root / OWN_QUESTIONS if rehearse else None)
    if source is not None:
        data = source.read_bytes()
    else:
        data = copy.read_bytes() if copy.exists() else download(GSM8K_URL)
    check_questions(data, str(source or GSM8K_URL), grid_for(rehearse).shots)
    if not copy.exists():
        replace_file(copy, data)
    elif copy.read_bytes() != data:
        raise ResultsError(f"{source} is not the file of {copy}; give another folder")
    return source.name if source else GSM8K_URL.rpartition("/")[2]


def download(url: str) -> bytes:
    try:
        response = requests.get(url, timeout=60)
        response.raise_for_status()
    except requests.RequestException as error:
        raise ResultsError(
            f"GSM8K cannot be downloaded: {error}. Get {url} in another way, and give "
            "the file with --gsm8k."
        ) from error
    return response.content


def check_questions(data: bytes, source: str, shots: int) -> None:
    """Raises ResultsError unless these are GSM8K's lines, more than the examples."""
    lines = data.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            good = isinstance(row["question"], str) and "#### " in row["answer"]
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise ResultsError(
                f'{source}, line {number}: not {{"question": ..., "answer": ...}} with '
                "an answer that ends in #### and a number"
            )
    if len(lines) <= shots:
        raise ResultsError(f"{source}: {len(lines)} questions; {shots} are examples")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is there in whole or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_bytes(data)
    temporary.replace(path)
