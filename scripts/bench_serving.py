#!/usr/bin/env python3
"""Measure sglang's MXFP8 backends with real servers, or rehearse that on a CPU.

    bench_serving.py RESULTS --model MODEL [--bf16-model MODEL] [-- SERVER ARGUMENT...]
    bench_serving.py RESULTS --rehearse

A server for each backend is launched, measured by sglang.bench_serving in a prefill-heavy
and a decode-heavy case at several concurrencies, updated from disk, and asked GSM8K's
questions by sglang's own evaluation. The servers take turns over the repeats. Interrupted,
the same command goes on where it stopped.

RESULTS/environment.json   the machine, the versions, and what all servers share
RESULTS/self_check.txt     the kernels of the model's shapes against plain torch
RESULTS/REPEAT-SERVER/     CASE-cN.jsonl as bench_serving wrote it, updated.json (updates
                           and GSM8K), all logs, and failed.txt of a run that failed
RESULTS/report.md          made of these by report.py

It needs the patched sglang: this Python's, or .venv's (./scripts/setup.sh). What it sets
itself of a server's arguments wins over a SERVER ARGUMENT.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import distribution, distributions
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from in_venv import run_in_venv

if __name__ == "__main__" and importlib.util.find_spec("sglang") is None:
    run_in_venv()

import requests
from serve import CPU_FLAGS, Failed, log_end, say, stop, wait_until_healthy

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = "REHEARSAL on a CPU, kernels emulated: it says nothing about speed."
REHEARSAL_MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
START_LIMIT_S = 3600
HOST = "127.0.0.1"
LAYOUT = "SGLANG_MXFP8_TRTLLM_SF_LAYOUT"
# What the servers differ in must not come from the shell.
OURS = (LAYOUT, "SGLANG_MXFP8_LINEAR_BACKEND", "SGLANG_MXFP8_EMULATION")
PACKAGES = ("sglang", "flashinfer-python", "flashinfer-cubin", "torch", "triton")
EMULATION = {
    "SGLANG_MXFP8_EMULATION": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT / "scripts" / "cpu_stand_ins"),
    "OMP_NUM_THREADS": "1",  # threads that wait for each other crawl on a shared machine
}
# What each server adds: its --fp8-gemm-backend (None: the model before its conversion),
# and its environment.
SERVERS = {
    "bf16": (None, {}),
    "auto": ("auto", {}),
    "triton": ("triton", {}),
    "flashinfer_cutlass": ("flashinfer_cutlass", {}),
    "flashinfer_trtllm": ("flashinfer_trtllm", {}),
    "flashinfer_trtllm_8x4": ("flashinfer_trtllm", {LAYOUT: "8x4"}),
    "flashinfer_trtllm_128x4": ("flashinfer_trtllm", {LAYOUT: "128x4"}),
}
SELF_CHECK = "sglang.srt.layers.quantization.mxfp8.self_check"
UPDATES = 5
# A case is the tokens in and out of its requests.
FULL = {
    "cases": {"prefill": (4096, 64), "decode": (128, 1024)},
    "servers": [name for name in SERVERS if name not in ("bf16", "auto")],
    "answer_tokens": 512,
}
SMALL = {
    "cases": {"prefill": (64, 2), "decode": (16, 6)},
    "servers": ["flashinfer_cutlass", "flashinfer_trtllm"],
    "concurrency": [1, 2],
    "repeats": 1,
    "questions": 3,
    "answer_tokens": 16,
    "model": f"{REHEARSAL_MODEL}-MXFP8",
    "bf16_model": str(REHEARSAL_MODEL),
    "gsm8k": str(ROOT / "benchmark" / "mxfp8" / "questions.jsonl"),
}
Session = argparse.Namespace


def parse_arguments(arguments: list[str]) -> Session:
    """The arguments, with `env` for all programs. Raises OSError without a GSM8K file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    at = arguments.index("--") if "--" in arguments else len(arguments)
    rehearse = "--rehearse" in arguments[:at]
    add = parser.add_argument
    add("results", type=Path, help="a folder, new or of the same measurement")
    add("--model", help="an MXFP8 checkpoint", required=not rehearse)
    add("--bf16-model", metavar="MODEL", help="the same in bf16, to be measured, too")
    add("--tp", type=int, default=1, help="the GPUs of a server")
    add("--servers", nargs="+", choices=[*SERVERS], metavar="NAME")
    add("--concurrency", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    add("--repeats", type=int, default=3)
    add("--gsm8k", metavar="FILE", help="GSM8K's test.jsonl (default: downloaded)")
    add("--questions", type=int, default=1319, help="of GSM8K; 0 asks none")
    add("--rehearse", action="store_true", help="on the CPU, with a small model")
    parser.set_defaults(**SMALL if rehearse else FULL)
    session = parser.parse_args(arguments[:at])
    session.arguments = arguments[at + 1 :]
    session.env = {k: v for k, v in os.environ.items() if k not in OURS}
    if session.bf16_model:
        session.servers = ["bf16", *session.servers]
    if rehearse:
        session.arguments = [*CPU_FLAGS.split(), *session.arguments]
        session.env |= EMULATION
        if not Path(session.model).is_dir():
            parser.error(f"no {session.model}: ./scripts/serve.sh --ask Hello makes it")
    for name in ("model", "bf16_model", "gsm8k"):
        value = getattr(session, name)
        if value and Path(value).exists():
            setattr(session, name, str(Path(value).resolve()))
    if session.gsm8k:
        lines = Path(session.gsm8k).read_text().strip().splitlines()
        session.questions = min(session.questions, len(lines))
    return session


def visible_gpus() -> list[str]:
    """A line of nvidia-smi for each GPU that CUDA_VISIBLE_DEVICES leaves."""
    wanted = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command += [] if visible is None else ["-i", visible or "none"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, text=True, stderr=DEVNULL).splitlines()
    return []


def describe(session: Session, gpus: list[str]) -> dict:
    """The machine and all that changes a figure, without the names of hosts and paths."""
    record = distribution("sglang").read_text("RECORD") or ""
    files = [x for x in record.splitlines() if re.match("sglang/.*,sha256=", x)]
    settings = vars(session) | {
        "env": {k: v for k, v in session.env.items() if k.startswith("SGLANG_")},
        "gpus": gpus,
        "cpu": re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[:1],
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
        "sglang_files": hashlib.sha256("\n".join(sorted(files)).encode()).hexdigest(),
        "all_servers": SERVERS,
    }
    # What may be another at the next time, since it changes no figure.
    growing = ("results", "servers", "repeats", "concurrency")
    settings["last_session"] = {name: settings.pop(name) for name in growing}
    settings["last_session"]["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    # `/home/me/model` and `https://host/model` become `model`.
    text = json.dumps(settings, indent=1, default=str)
    return json.loads(re.sub(r'(?<=[\s"\'=:,])([/~][^\s"\',]*)?/', "", text))


def write_environment(path: Path, new: dict) -> None:
    """Raises Failed where the folder has figures of another machine, model or build."""
    old = json.loads(path.read_text()) if path.exists() else new
    differ = [
        f"  {name}: {old.get(name)} there, {new.get(name)} here"
        for name in {**old, **new}
        if name != "last_session" and old.get(name) != new.get(name)
    ]
    if differ:
        raise Failed("\n".join(["RESULTS is of something else:", *differ]))
    path.write_text(json.dumps(new, indent=1) + "\n")


def start(session: Session, module: str, flags: list, log: Path, **env: str) -> Popen:
    """A module of Python, in a process group of its own and in the log's folder."""
    with log.open("w") as output:
        if session.rehearse:
            print(REHEARSAL, file=output, flush=True)
        return Popen(
            [sys.executable, "-W", "ignore", "-m", module, *map(str, flags)],
            cwd=log.parent,
            env=session.env | env,
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
            start_new_session=True,
        )


def run(session: Session, module: str, flags: list, log: Path) -> None:
    """Raises Failed if the module fails."""
    process = start(session, module, flags, log)
    try:
        status = process.wait()
    finally:
        stop(process)
    if status != 0:
        raise Failed(f"{module} failed\n{log_end(log)}")


def self_check(session: Session) -> None:
    """Compare the kernels of the model's shapes with plain torch, once."""
    told = session.results / "self_check.txt"
    if not told.exists():
        partly = told.with_suffix(".partial")
        run(session, SELF_CHECK, ["--model", session.model, "--tp", session.tp], partly)
        partly.rename(told)


@contextlib.contextmanager
def running_server(session: Session, name: str, folder: Path):
    """Yields the port of a server that is ready, and that is stopped afterwards."""
    backend, env = SERVERS[name]
    model = session.model if backend else session.bf16_model
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    flags = [*session.arguments, "--model-path", model, "--tp", session.tp]
    flags += ["--fp8-gemm-backend", backend] if backend else []
    flags += ["--host", HOST, "--port", port]
    log = folder / f"server-{len(list(folder.glob('server-*.log'))) + 1}.log"
    process = start(session, "sglang.launch_server", flags, log, **env)
    try:
        wait_until_healthy(process, f"http://{HOST}:{port}", log, START_LIMIT_S)
        if bool(backend) != ("MXFP8 linear layers: " in log.read_text()):
            raise Failed(f"{Path(model).name} is not in the format of this server")
        yield port
    finally:
        stop(process)


def bench(session: Session, case: str, n: int, port: int, output: Path) -> str:
    """Let bench_serving send requests of the case, up to n at a time, and n before."""
    tokens_in, tokens_out = session.cases[case]
    count = 4 * n + 4
    output.unlink(missing_ok=True)
    flags = ["--backend", "sglang", "--host", HOST, "--port", port]
    flags += ["--model", session.model, "--warmup-requests", n, "--flush-cache"]
    flags += ["--dataset-name", "random-ids", "--tokenize-prompt", "--disable-tqdm"]
    flags += ["--random-input-len", tokens_in, "--random-output-len", tokens_out]
    flags += ["--random-range-ratio", 1, "--num-prompts", count]
    flags += ["--max-concurrency", n, "--output-file", output]
    flags += ["--tag", "rehearsal" if session.rehearse else "measured"]
    run(session, "sglang.bench_serving", flags, output.with_suffix(".log"))
    row = json.loads(output.read_text())
    if row["completed"] != count:
        raise Failed(f"{row['completed']} of {count} requests succeeded")
    return f"{row['total_throughput']:.1f} tokens/s"


def update_and_ask(session: Session, model: str, port: int, output: Path) -> str:
    """Load the same weights again, several times, and ask GSM8K's questions of them."""
    result = {"rehearsal": session.rehearse, "update_s": []}
    url = f"http://{HOST}:{port}/update_weights_from_disk"
    for _ in range(UPDATES):
        begin = time.perf_counter()
        answer = requests.post(url, json={"model_path": model}, timeout=3600)
        if not answer.ok or not answer.json()["success"]:
            raise Failed(f"the weight update was refused: {answer.text[:1000]}")
        result["update_s"].append(time.perf_counter() - begin)
    if session.questions:
        result["questions"] = session.questions
        log = output.with_suffix(".log")
        flags = ["--port", port, "--num-questions", session.questions]
        flags += ["--max-new-tokens", session.answer_tokens]
        flags += ["--data-path", session.gsm8k] if session.gsm8k else []
        run(session, "sglang.test.few_shot_gsm8k", flags, log)
        for name in ("Accuracy", "Invalid"):
            found = re.search(f"^{name}: (.*)", log.read_text(), re.MULTILINE)
            result[name.lower()] = float(found[1])
    output.write_text(json.dumps(result) + "\n")
    return ", ".join(f"{name} {value}" for name, value in result.items())


def measure(session: Session, server: str, folder: Path) -> None:
    """Make the files that a run lacks. Raises Failed."""
    steps = {
        f"{case}-c{n}.jsonl": partial(bench, session, case, n)
        for case in session.cases
        for n in session.concurrency
    }
    model = session.model if SERVERS[server][0] else session.bf16_model
    steps["updated.json"] = partial(update_and_ask, session, model)
    left = [name for name in steps if not (folder / name).exists()]
    if not left:
        return
    folder.mkdir(exist_ok=True)
    with running_server(session, server, folder) as port:
        for name in left:
            partly = folder / f"{name}.partial"
            say(f"  {name}: {steps[name](port, partly)}")
            partly.rename(folder / name)


def measure_all(session: Session) -> list[str]:
    """Make all runs; returns those that failed. The servers take turns at being first."""
    failures, count = [], len(session.servers)
    for number in range(session.repeats * count):
        repeat, place = divmod(number, count)
        name = session.servers[(repeat + place) % count]
        folder = session.results / f"{repeat + 1}-{name}"
        say(f"[{number + 1}/{session.repeats * count}] {folder.name}")
        failed = folder / "failed.txt"
        failed.unlink(missing_ok=True)
        try:
            measure(session, name, folder)
        except (Failed, requests.RequestException) as error:
            failed.write_text(f"{error}\n")
            failures.append(f"FAILED: {folder.name}: {str(error).splitlines()[0]}")
            say(f"FAILED: {error}")
    return failures


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, signal.default_int_handler)
    try:
        session = parse_arguments(sys.argv[1:])
        gpus = [] if session.rehearse else visible_gpus()
        if not session.rehearse and session.tp > len(gpus):
            raise Failed(f"{session.tp} GPUs needed, {len(gpus)} visible; --rehearse?")
        say(REHEARSAL if session.rehearse else "\n".join(gpus))
        session.results.mkdir(parents=True, exist_ok=True)
        write_environment(session.results / "environment.json", describe(session, gpus))
        self_check(session)
        failures = measure_all(session)
    except (Failed, OSError) as error:
        say(f"bench_serving.py: {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on from here.")
        return 130
    say("\n".join(failures))
    report = [sys.executable, str(ROOT / "scripts" / "report.py"), str(session.results)]
    return max(bool(failures), subprocess.run(report, check=False).returncode)


if __name__ == "__main__":
    sys.exit(main())
