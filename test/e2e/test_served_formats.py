"""SmolLM2 from each checkpoint format, by real servers on a CPU (kernels emulated)."""

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
BF16 = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
OWN = BF16.with_name(f"{BF16.name}-MXFP8")
QUESTION = "What is the capital of Japan?"
TEXT = "In winter, some of the water stays on the mountains as ice for months."

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a CPU test: a GPU needs the kernels"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The same bytes in each format."""
    made = {"sglang": OWN}
    for name in "modelopt", "compressed-tensors":
        made[name] = tmp_path_factory.mktemp("models") / name
        convert = ROOT / "scripts" / "convert_to_mxfp8.py"
        command = [sys.executable, "-W", "ignore", convert, BF16, made[name]]
        subprocess.run([*command, "--format", name], check=True)
    # As ModelOpt's older exports have it: only hf_quant_config.json says what it is.
    path = made["modelopt"] / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    return made


@pytest.fixture
def serve():
    """A context in which a checkpoint is served, at the URL that it gives."""
    from sglang.srt.utils import kill_process_tree
    from sglang.test.mxfp8_utils import launch_cpu_server

    @contextlib.contextmanager
    def served(model: Path):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = launch_cpu_server(str(model), url, "flashinfer_trtllm")
        try:
            yield url
        finally:
            kill_process_tree(process.pid)

    return served


def answer(url: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    chat = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=16,
    )
    return chat.choices[0].message.content


def logprobs(url: str) -> torch.Tensor:
    from sglang.test.mxfp8_utils import prompt_logprobs

    return prompt_logprobs(url, AutoTokenizer.from_pretrained(OWN)(TEXT)["input_ids"])


def test_every_format_gives_the_same_answers(checkpoints, serve):
    expected = None
    for name, path in checkpoints.items():
        with serve(path) as url:
            assert "Tokyo" in answer(url), name
            got = logprobs(url)
        expected = got if expected is None else expected
        assert torch.equal(got, expected), name
