#!/usr/bin/env python3
"""Perplexity of a served model over a fixed text, and of MXFP8 beside bf16.

Asks a server, over HTTP, for the log probability of each token of text.txt (whose origin
is in README.md beside it).

    accuracy.py --url URL --output FILE.json            one running server
    accuracy.py --compare BF16.json MXFP8.json ...      runs against the first of them
    accuracy.py --serve [--bf16 DIR] [--mxfp8 DIR]      a server for bf16 and one for each
                                                        backend, one after the other

The text is read in windows of --window tokens that do not overlap, one at a time, so that
every server computes on the same shapes; a window's first token has no context and is not
scored, and what does not fill a window is left out. Needs .venv (./scripts/setup.sh).
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import math
import os
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
from in_venv import run_in_venv

run_in_venv()
import requests
from tqdm import tqdm

TEXT = Path(__file__).with_name("text.txt")
MODELS = ROOT / ".cache" / "models"
TIMEOUT_S = 600  # of one request
BACKENDS = "flashinfer_trtllm", "flashinfer_cutlass"
LOGPROBS = {  # nats of each token of the prompt
    "sampling_params": {"max_new_tokens": 1, "temperature": 0},
    "return_logprob": True,
    "logprob_start_len": 0,
}
EMULATED = (
    "- CPU: **FlashInfer's kernels were emulated in plain torch and nothing ran on "
    "SM100**: this is what MXFP8 itself costs, not how the kernels round. Equal rows show "
    "that both layouts were undone rightly, and no more."
)
METHOD = (
    "± is one standard error, with windows taken for independent; differences are paired "
    "token by token."
)
HEAD = """
| run | perplexity | mean NLL of a token (nats) | NLL less the first run's | mean \\|change\\| of a token's log probability |
| --- | --- | --- | --- | --- |"""
Windows = list[list[float]]  # log probabilities of one run, in nats, by window


def clustered_mean(windows: Windows) -> tuple[float, float]:
    """Mean over all values, and a standard error that takes windows, not values, for
    independent. Raises ValueError for windows of different lengths, or fewer than two.
    """
    if len(windows) < 2 or len({len(window) for window in windows}) != 1:
        raise ValueError("needs at least two windows of one length")
    means = [statistics.fmean(window) for window in windows]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


def differences(base: Windows, other: Windows) -> Windows:
    """By token, how much higher the -log p of `other` is than that of `base`."""
    pairs = zip(base, other, strict=True)
    return [[b - o for b, o in zip(*pair, strict=True)] for pair in pairs]


def mean_change(base: Windows, other: Windows) -> float:
    """Mean |difference| of a token's log probability."""
    return statistics.fmean(abs(d) for each in differences(base, other) for d in each)


def tokenize(model: str) -> list[int]:
    """The ids of the whole text, by the model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(TEXT.read_text())["input_ids"]


def split(ids: list[int], window: int, tokens: int | None = None) -> list[list[int]]:
    """The windows that the first `tokens` ids fill (all ids: None)."""
    if tokens is not None and not 2 * window <= tokens <= len(ids):
        raise ValueError(
            f"--tokens {tokens}: give at least two windows of {window}, and at most "
            f"{len(ids)}, the text's length"
        )
    ids = ids[:tokens]
    return [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]


def window_logprobs(url: str, window: list[int]) -> list[float]:
    """Log probability of each token of a window but the first."""
    request = {"input_ids": window, **LOGPROBS}
    response = requests.post(f"{url}/generate", json=request, timeout=TIMEOUT_S)
    response.raise_for_status()
    answer = response.json()["meta_info"]["input_token_logprobs"]
    if [token for _, token, *_ in answer] != window:
        raise ValueError("the server scored other tokens than it was asked for")
    logprobs = [logprob for logprob, *_ in answer[1:]]
    if not all(math.isfinite(logprob) and logprob <= 0 for logprob in logprobs):
        raise ValueError("the server's log probabilities are not all finite and <= 0")
    return logprobs


def measure(url: str, window: int, tokens: int | None = None, layers: str = "") -> dict:
    """Ask the server at `url` for every window; `layers` is what its log said."""
    response = requests.get(f"{url}/server_info", timeout=TIMEOUT_S)
    response.raise_for_status()
    info = response.json()
    windows = split(tokenize(info["tokenizer_path"]), window, tokens)
    name = f"{Path(info['model_path']).name}, {info['fp8_gemm_runner_backend']}"
    return {
        "name": name,
        "where": f"{info['device']}; sglang {info['version']}. {layers}",
        "tokens": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "logprobs": [window_logprobs(url, ids) for ids in tqdm(windows, desc=name)],
    }


@contextlib.contextmanager
def server(model: str, backend: str) -> Iterator[tuple[str, str]]:
    """The URL of a real server with `--fp8-gemm-backend`, on the GPU, or on a CPU with
    FlashInfer's kernels emulated, and its log's line about MXFP8; stopped at the end.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu:  # a server without a CUDA driver, and sglang's import here
        sys.path.insert(0, str(ROOT / "scripts" / "cpu_stand_ins"))
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        path = filter(None, [sys.path[0], os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    from sglang.srt.utils import kill_process_tree
    from sglang.test.mxfp8_utils import launch_cpu_server
    from sglang.test.test_utils import find_available_port, popen_launch_server

    log, url = io.StringIO(), f"http://127.0.0.1:{find_available_port(21000)}"
    if has_gpu:
        flags = ["--fp8-gemm-backend", backend]
        output = dict(return_stdout_stderr=(log, log))
        process = popen_launch_server(model, url, 1800, other_args=flags, **output)
    else:
        process = launch_cpu_server(model, url, backend, log=log)
    try:
        line = re.search(r"MXFP8 linear layers: .*", log.getvalue())
        yield url, line.group() if line else ""
    finally:
        kill_process_tree(process.pid)


def serve_all(args: argparse.Namespace) -> Iterator[dict]:
    """A run for bf16 and one for each backend, one server at a time."""
    for model, backend in [(args.bf16, "auto"), *((args.mxfp8, b) for b in BACKENDS)]:
        with server(str(model), backend) as (url, layers):
            yield measure(url, args.window, args.tokens, layers)


def row(run: dict, base: dict) -> str:
    nll, error = clustered_mean([[-p for p in window] for window in run["logprobs"]])
    perplexity = math.exp(nll)
    cells = [run["name"], f"{perplexity:.2f} ± {perplexity * error:.2f}"]
    cells += [f"{nll:.4f} ± {error:.4f}", "", ""]
    if run is not base:
        pair = base["logprobs"], run["logprobs"]
        mean, error = clustered_mean(differences(*pair))
        cells[-2:] = f"{mean:.4f} ± {error:.4f}", f"{mean_change(*pair):.3f}"
    return f"| {' | '.join(cells)} |"


def report(runs: Sequence[dict]) -> Iterator[str]:
    """The lines of the result: the runs, the first one the base of the differences.
    Raises ValueError if they were not asked for the same tokens."""
    base = runs[0]
    if len({run["tokens"] for run in runs}) != 1:
        raise ValueError("the runs were not asked for the same tokens")
    windows, scored = len(base["logprobs"]), len(base["logprobs"][0])
    yield f"# Accuracy of MXFP8 on a real model\n\n{datetime.date.today()}\n"
    if any(run["where"].startswith("cpu") for run in runs):
        yield EMULATED
    for run in runs:
        yield f"- {run['name']}: {run['where']}"
    yield (
        f"\nReal servers, asked over HTTP for the log probability of each token of "
        f"`text.txt`: {windows} windows of {scored + 1} tokens, of which "
        f"{windows * scored} were scored. {METHOD}"
    )
    yield HEAD
    yield from (row(run, base) for run in runs)
    for other in runs[2:]:
        pairs = differences(runs[1]["logprobs"], other["logprobs"])
        changed = sum(d != 0 for window in pairs for d in window)
        same = f"differ in {changed} tokens" if changed else "are equal, bit for bit"
        yield f"\nThe log probabilities of {runs[1]['name']} and {other['name']} {same}."


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--url", help="ask this running server")
    mode.add_argument("--compare", type=Path, nargs="+", metavar="FILE")
    mode.add_argument("--serve", action="store_true", help="launch and ask servers")
    name = "SmolLM2-135M-Instruct"
    parser.add_argument("--bf16", type=Path, default=MODELS / name)
    parser.add_argument("--mxfp8", type=Path, default=MODELS / f"{name}-MXFP8")
    parser.add_argument("--tokens", type=int, help="only the text's first (all of it)")
    parser.add_argument("--window", type=int, default=1024, help="tokens (%(default)s)")
    parser.add_argument("--output", type=Path, help="the run's JSON, or the Markdown")
    args = parser.parse_args()
    # Or a server of ours would outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.url:
            runs = [measure(args.url, args.window, args.tokens)]
        elif args.serve:
            runs = list(serve_all(args))
        else:
            runs = [json.loads(path.read_text()) for path in args.compare]
        text = "\n".join(report(runs)) + "\n"
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        sys.exit(f"accuracy.py: {error}")
    print(text)
    if args.output:
        args.output.write_text(json.dumps(runs[0]) if args.url else text)


if __name__ == "__main__":
    main()
