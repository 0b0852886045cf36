#!/usr/bin/env python3
"""Perplexity over a fixed text of a served model in MXFP8, beside the same in bf16.

A real server for bf16 and one for each backend, one after the other, asked over HTTP for
the log probability of each token of text.txt (README.md beside it says where that is
from), in windows that do not overlap, one at a time, so that every server computes on the
same shapes. A window's first token has no context and is not scored; what does not fill a
window is left out. ± is one standard error, with windows taken for independent;
differences are paired token by token. Without a GPU, FlashInfer's kernels are emulated in
plain torch: then this is what MXFP8 itself costs, not how the kernels round, and equal rows
show that both layouts are undone rightly, and no more.

Needs .venv (./scripts/setup.sh).

    accuracy.py [--bf16 MODEL --mxfp8 MODEL] [--tp TP] [-- SERVER ARGUMENT...] > FILE
"""

import argparse
import datetime
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
from in_venv import run_in_venv

run_in_venv()
import bench_serving
import numpy
import requests
from tqdm import tqdm

TEXT = Path(__file__).with_name("text.txt")
GPUS = bench_serving.visible_gpus()
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
TIMEOUT_S = 600  # of one request
SERVERS = "bf16", "flashinfer_trtllm", "flashinfer_cutlass"
HEAD = """
| server | perplexity | mean NLL of a token (nats) | NLL less the first's | mean \\|change\\| of a token's log probability |
| --- | --- | --- | --- | --- |"""


def clustered_mean(values: numpy.ndarray) -> tuple[float, float]:
    """Mean over all values [windows, tokens], and a standard error that takes windows,
    not values, for independent. Raises ValueError for fewer than two windows."""
    if len(values) < 2:
        raise ValueError("the text fills fewer than two windows")
    means = values.mean(axis=1)
    return means.mean(), means.std(ddof=1) / len(means) ** 0.5


def tokenize(model: str) -> list[int]:
    """The ids of the whole text, by the model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(TEXT.read_text())["input_ids"]


def window_logprobs(url: str, window: list[int]) -> list[float]:
    """Log probability of each token of a window but the first."""
    request = {"input_ids": window, "sampling_params": {"max_new_tokens": 1}}
    request |= {"return_logprob": True, "logprob_start_len": 0}
    response = requests.post(f"{url}/generate", json=request, timeout=TIMEOUT_S)
    response.raise_for_status()
    answer = response.json()["meta_info"]["input_token_logprobs"]
    if [token for _, token, *_ in answer] != window:
        raise ValueError("the server scored other tokens than it was asked for")
    logprobs = [logprob for logprob, *_ in answer[1:]]
    if not (numpy.isfinite(logprobs) & numpy.less_equal(logprobs, 0)).all():
        raise ValueError("the server's log probabilities are not all finite and <= 0")
    return logprobs


def measure(args: argparse.Namespace, name: str) -> tuple[str, numpy.ndarray]:
    """What the log of the server `name` says of MXFP8, and the log probabilities [windows,
    tokens] that it gives."""
    rehearse = [] if GPUS else ["--rehearse"]
    models = ["--model", str(args.mxfp8), "--bf16-model", str(args.bf16)]
    flags = ["no folder", *rehearse, *models, "--tp", args.tp, "--", *args.arguments]
    session = bench_serving.parse_arguments(flags)
    ids = tokenize(session.model)[: args.tokens]
    ends = range(args.window, len(ids) + 1, args.window)
    windows = [ids[end - args.window : end] for end in ends]
    with tempfile.TemporaryDirectory() as folder:
        with bench_serving.running_server(session, name, Path(folder)) as port:
            url = f"http://{bench_serving.HOST}:{port}"
            logprobs = [window_logprobs(url, each) for each in tqdm(windows, desc=name)]
        log = Path(folder, "server-1.log").read_text()
    layers = "".join(re.findall(r"MXFP8 linear layers: .*", log)[:1])
    return layers, numpy.array(logprobs)


def row(name: str, logprobs: numpy.ndarray, base: numpy.ndarray) -> str:
    nll, error = clustered_mean(-logprobs)
    perplexity = numpy.exp(nll)
    cells = [name, f"{perplexity:.2f} ± {perplexity * error:.2f}"]
    cells += [f"{nll:.4f} ± {error:.4f}", "", ""]
    if logprobs is not base:
        mean, error = clustered_mean(base - logprobs)
        change = numpy.abs(base - logprobs).mean()
        cells[-2:] = f"{mean:.4f} ± {error:.4f}", f"{change:.3f}"
    return f"| {' | '.join(cells)} |"


def report(logprobs: dict[str, numpy.ndarray]) -> Iterator[str]:
    """The tables; the first server is the base of the differences."""
    base, second, *others = logprobs
    windows, scored = logprobs[base].shape
    yield f"\n{windows} windows of {scored + 1} tokens"
    yield HEAD
    yield from (row(name, each, logprobs[base]) for name, each in logprobs.items())
    for other in others:
        changed = (logprobs[second] != logprobs[other]).sum()
        same = f"differ in {changed} tokens" if changed else "are equal, bit for bit"
        yield f"\nThe log probabilities of {second} and {other} {same}."


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--bf16", default=MODEL, help="default: SmolLM2")
    parser.add_argument("--mxfp8", default=f"{MODEL}-MXFP8")
    parser.add_argument("--tp", default="1", help="the GPUs of a server")
    parser.add_argument("--tokens", type=int, help="only the text's first (all of it)")
    parser.add_argument("--window", type=int, default=1024, help="tokens (%(default)s)")
    parser.add_argument("arguments", nargs="*", help="of the servers, after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so servers end, too
    print(f"# Accuracy of {Path(args.mxfp8).name}\n")
    print(GPUS or "CPU, emulated", datetime.date.today())
    print("", __doc__.split("\n\n")[1], sep="\n")
    try:
        logprobs = {}
        for name in SERVERS:
            layers, logprobs[name] = measure(args, name)
            print(f"\n- {name}: {layers}", flush=True)
        print("\n".join(report(logprobs)))
    except (OSError, ValueError, bench_serving.Failed) as error:  # also requests'
        sys.exit(f"accuracy.py: {error}")


if __name__ == "__main__":
    main()
