"""scripts/serve.sh as a user runs it: a real model, a real server, a real answer.

MXFP8_RELEASE, which test.sh sets and serve.sh reads, is the release of sglang.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "scripts" / "serve.sh"
BF16 = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of Japan?"
IS_0_5_9 = os.environ.get("MXFP8_RELEASE", "0.5.9") == "0.5.9"


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def run(port: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SERVE, "--port", str(port), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )


def test_served_model_knows_the_capital_of_japan(port):
    check_answer(run(port, "--ask", QUESTION))
    assert not answers(port)


@pytest.mark.skipif(not IS_0_5_9, reason="the stack of 0.5.23 does not serve them")
@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
def test_other_formats_give_the_same_layers_and_answer(form, port, tmp_path):
    model = tmp_path / form
    convert = ROOT / "scripts" / "convert_to_mxfp8.py"
    subprocess.run([convert, BF16, model, f"--format={form}"], check=True)
    if form == "modelopt":  # whose older exports have hf_quant_config.json alone
        config = json.loads((model / "config.json").read_text())
        del config["quantization_config"]
        (model / "config.json").write_text(json.dumps(config))
    check_answer(run(port, "--model", str(model), "--ask", QUESTION))


def check_answer(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stderr
    assert "Tokyo" in result.stdout
    if not IS_0_5_9:
        assert "MXFP8 linears run on FlashInfer's kernels as emulated" in result.stderr
        return
    [layers] = re.findall("(?m)^MXFP8 linear layers: .*$", result.stderr)
    assert re.search(r"\d+ on flashinfer_cutlass .*; \d+ on flashinfer_trtllm", layers)
    readme = (ROOT / "README.md").read_text().splitlines()
    assert layers in readme and result.stdout.strip() in readme


def test_a_server_that_cannot_start_is_reported(port):
    result = run(port, "--", "--no-such-flag")
    assert result.returncode == 1
    assert "unrecognized arguments: --no-such-flag" in result.stderr
    assert "the server stopped while it started" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupting_stops_the_server(name, port):
    process = subprocess.Popen(
        [SERVE, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs start with SIGINT ignored, and bash cannot undo that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:
            if line.startswith("Starting the server"):
                break
        time.sleep(3)
        group = server_group(process.pid)
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == 128 + getattr(signal, name)
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)
    finally:
        process.terminate()
        process.wait(timeout=60)


def server_group(parent: int) -> int:
    """The process group of the server that serve.sh, `parent`, started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent_id, group = stat.read_text().rpartition(")")[2].split()[:3]
        except FileNotFoundError:
            continue
        if int(parent_id) == parent and int(group) != os.getpgid(parent):
            return int(group)
    raise AssertionError("serve.sh has started no server")
