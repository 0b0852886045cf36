"""scripts/serve.sh as a user runs it: a real model, a real server, a real answer.

MXFP8_RELEASE, which test.sh sets and serve.sh reads, is the release of sglang.
"""

import os
import re
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUESTION = "What is the capital of Japan?"
IS_0_5_9 = os.environ.get("MXFP8_RELEASE", "0.5.9") == "0.5.9"


def test_served_model_knows_the_capital_of_japan():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [ROOT / "scripts" / "serve.sh", "--port", str(port), "--ask", QUESTION]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=800
    )
    assert result.returncode == 0, result.stderr
    assert "Tokyo" in result.stdout
    if not IS_0_5_9:
        assert "MXFP8 linears run on FlashInfer's kernels as emulated" in result.stderr
        return
    [layers] = re.findall("(?m)^MXFP8 linear layers: .*$", result.stderr)
    assert re.search(r"\d+ on flashinfer_cutlass .*; \d+ on flashinfer_trtllm", layers)
    readme = (ROOT / "README.md").read_text().splitlines()
    assert layers in readme and result.stdout.strip() in readme
    with socket.socket() as client:  # the server has ended
        assert client.connect_ex(("127.0.0.1", port)) != 0
