"""Serve an MXFP8 model with the patched sglang, on the GPU or emulated on the CPU.

Sets up .venv on the first run (see ./scripts/setup.sh --help). On the CPU, where no CUDA
device is visible, FlashInfer's kernels are emulated. All other arguments are for
sglang.launch_server, e.g. -- --fp8-gemm-backend flashinfer_cutlass
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

SCRIPTS = Path(__file__).resolve().parent
# The default model is on disk: transformers need not ask its hub. Threads that wait for
# each other crawl as soon as another program runs, and torch.compile would take half a
# minute of the first answer.
PREPARE = """
source "$0/setup.sh"
setup
[[ -n $1 ]] || { get_default_model && export HF_HUB_OFFLINE=1; }
if ! cuda_device_visible; then
    use_cpu_stand_ins
    export SGLANG_MXFP8_EMULATION=1 SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
VENV=$VENV DEFAULT_MODEL=$DEFAULT_MODEL env -0
"""
CPU_FLAGS = "--device cpu --attention-backend torch_native --sampling-backend pytorch "
CPU_FLAGS += "--disable-overlap-schedule --max-total-tokens 8192"
NO_GPU = "No CUDA device is visible: FlashInfer's kernels are emulated on the CPU "
NO_GPU += "(SGLANG_MXFP8_EMULATION=1), so its speed says nothing about theirs"


say = partial(print, file=sys.stderr, flush=True)


class Failed(Exception):
    """Why something cannot go on; the first line says it all."""


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and the server's own."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "serve.sh", description=__doc__, formatter_class=raw
    )
    parser.allow_abbrev = False
    default = (
        "default: SmolLM2-135M-Instruct, downloaded and converted on the first run"
    )
    add = parser.add_argument
    add("--ask", metavar="QUESTION", help="print the model's answer, stop the server")
    add("--model", "--model-path", help=f"a folder, or a name on the hub ({default})")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--release", metavar="VERSION", help="of sglang, as 0.5.23 (default: 0.5.9)")
    return parser.parse_known_args([each for each in sys.argv[1:] if each != "--"])


def claim_port(host: str, port: int):
    """The server's log, locked until this script and the server, which inherits it, end."""
    path = SCRIPTS.parent / ".cache" / "logs" / f"server-{port}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a")
    in_use = f"serve.sh: port {port} is in use; choose another one by --port"
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(in_use)
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=5).close()
        sys.exit(in_use)
    log.truncate(0)
    return log


def prepare(options: argparse.Namespace) -> dict[str, str]:
    """Sets up the environment and the default model; the server's variables."""
    release = {"MXFP8_RELEASE": options.release} if options.release else {}
    command = ["bash", "-euc", PREPARE, SCRIPTS, options.model or ""]
    environment = os.environ | release
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def start_server(
    options: argparse.Namespace, arguments: list[str], env: dict, log
) -> subprocess.Popen:
    """In a session of its own, so that all its processes can be stopped by one id."""
    command = [f"{env['VENV']}/bin/python", "-m", "sglang.launch_server"]
    command += ["--model-path", options.model or env["DEFAULT_MODEL"]]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--fp8-gemm-backend", "auto"]
    if "SGLANG_USE_CPU_ENGINE" in env:
        say(NO_GPU)
        command += CPU_FLAGS.split()
    say(f"Starting the server (log: {log.name})")
    streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    command += arguments
    return subprocess.Popen(command, env=env, start_new_session=True, **streams)


def stop(leader: subprocess.Popen) -> None:
    """End all processes of a group, also when this is interrupted."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(leader.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                leader.wait(20)
        finally:
            os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def http(url: str, data: dict | None = None) -> bytes:
    """Raises OSError where the server does not answer with success."""
    body = json.dumps(data).encode() if data else None
    request = Request(url, body, {"Content-Type": "application/json"})
    with build_opener(ProxyHandler({})).open(request, timeout=600) as answer:
        return answer.read()


def log_end(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-20:]
    return "\n".join([f"The end of {log}:", *lines])


def wait_until_healthy(
    server: subprocess.Popen, url: str, log: Path, limit: float = math.inf
) -> None:
    """Tells of the log's last step now and then, and at the end what runs on what. Raises
    Failed if the server ends or takes more than `limit` seconds."""
    started, shown = time.monotonic(), ""
    while True:
        with contextlib.suppress(OSError):
            http(f"{url}/health")
            break
        text, seconds = log.read_text(errors="replace"), time.monotonic() - started
        if server.poll() is not None:
            raise Failed(f"the server did not start\n{log_end(log)}")
        if seconds > limit:
            raise Failed(f"the server did not start within {limit} s\n{log_end(log)}")
        steps = re.findall(r"(?m)^\[.*?\] (.{,150})", text)
        if int(seconds) % 5 == 2 and steps and steps[-1] != shown:
            shown = steps[-1]
            say(f"  {seconds:.0f} s: {shown}")
        time.sleep(1)
    layers = re.findall("MXFP8 linear.*", log.read_text(errors="replace"))
    say("\n".join(layers))
    say(f"The server is ready after {time.monotonic() - started:.0f} s")


def ask(url: str, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    request = {"messages": messages, "temperature": 0, "max_tokens": 256}
    answer = json.loads(http(f"{url}/v1/chat/completions", request))
    return answer["choices"][0]["message"]["content"]


def main() -> None:
    options, arguments = parse_arguments()
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
    url = f"http://{host}:{options.port}"
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    log = claim_port(options.host, options.port)
    env = prepare(options)
    server = start_server(options, arguments, env, log)
    try:
        wait_until_healthy(server, url, Path(log.name))
        if options.ask:
            print(ask(url, options.ask))
            return
        say(f"Serving on {url} (OpenAI-compatible, /v1); Ctrl-C stops it")
        server.wait()
        sys.exit(f"serve.sh: the server stopped: {log.name}")
    except Failed as error:
        sys.exit(f"serve.sh: {error}")
    finally:
        stop(server)


if __name__ == "__main__":
    main()
