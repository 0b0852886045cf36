"""Perplexity of a served model over a fixed text, and of MXFP8 beside bf16.

Asks a running server, over HTTP, for the log probability of each token of text.txt.

    accuracy.py --url URL --output FILE.json [--tokens N]
        one running server
    accuracy.py --compare BF16.json MXFP8.json ... [--output RESULT.md]
        a table of what such runs wrote, each run against the first one
    accuracy.py --serve [--bf16 DIR] [--mxfp8 DIR] [--tokens N] [--output RESULT.md]
        launches a server for bf16, for MXFP8 on flashinfer_trtllm and on
        flashinfer_cutlass, one after the other, asks each, stops it, and compares

The text is read in windows of --window tokens that do not overlap; a window's first token
has no context and is not scored, and what does not fill a window is left out. Windows are
asked for one at a time, so that every server computes on the same shapes.

text.txt is the beginning (chapters I to VI and part of VII) of "Alice's Adventures in
Wonderland" by Lewis Carroll (Charles Lutwidge Dodgson, 1832-1898), published in 1865: in
the public domain, the author having died more than 100 years ago. Taken from
tests/testdata/alice29.txt of the source distribution of brotli 1.1.0 on PyPI, from
"CHAPTER I" on, with LF for CR LF and nothing else changed.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import statistics
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

import requests
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(__file__).with_name("text.txt")
MODELS = ROOT / ".cache" / "models"
RUNS = ROOT / ".cache" / "accuracy"
WINDOW = 1024  # tokens
TIMEOUT_S = 600  # of one request
BACKENDS = "flashinfer_trtllm", "flashinfer_cutlass"
ROUTING_LINE = re.compile(r"MXFP8 linear layers: .*")


class Run(NamedTuple):
    """What one server answered, and what it was."""

    model: str  # the checkpoint's name
    backend: str  # --fp8-gemm-backend, or "bf16"
    device: str
    version: str  # sglang's
    layers: str  # what its log says about MXFP8 layers; "" where it was not seen
    digest: str  # of the tokens asked for
    logprobs: List[List[float]]  # in nats, one list per window

    @property
    def label(self) -> str:
        return "bf16" if self.backend == "bf16" else f"MXFP8, {self.backend}"


# Statistics: lists of log probabilities, one list per window, in nats.


class Estimate(NamedTuple):
    mean: float
    error: float  # standard error


def clustered_mean(windows: Sequence[Sequence[float]]) -> Estimate:
    """Mean over all values, with a standard error that takes windows, not values, for
    independent. Raises ValueError for windows of different lengths, or fewer than two.
    """
    if len(windows) < 2 or len({len(window) for window in windows}) != 1:
        raise ValueError("needs at least two windows of one length")
    means = [statistics.fmean(window) for window in windows]
    error = statistics.stdev(means) / math.sqrt(len(means))
    return Estimate(statistics.fmean(means), error)


def negative_log_likelihood(logprobs: List[List[float]]) -> Estimate:
    """Mean -log p of a token, in nats."""
    return clustered_mean([[-p for p in window] for window in logprobs])


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate, its error to first order."""
    value = math.exp(estimate.mean)
    return Estimate(value, value * estimate.error)


def token_differences(
    base: List[List[float]], other: List[List[float]]
) -> List[List[float]]:
    """By token, how much higher the -log p of `other` is than that of `base`, in nats."""
    return [
        [b - o for b, o in zip(*pair, strict=True)]
        for pair in zip(base, other, strict=True)
    ]


def paired_difference(base: List[List[float]], other: List[List[float]]) -> Estimate:
    """Mean -log p of `other` less that of `base`, token by token, in nats."""
    return clustered_mean(token_differences(base, other))


def mean_change(base: List[List[float]], other: List[List[float]]) -> float:
    """Mean |difference| of a token's log probability, in nats."""
    differences = token_differences(base, other)
    return statistics.fmean(abs(d) for window in differences for d in window)


# One running server.


def tokenize(model: str) -> List[int]:
    """The ids of the whole text, by the model's tokenizer."""
    transformers_logging.set_verbosity_error()  # the text is longer than the context
    return AutoTokenizer.from_pretrained(model)(TEXT.read_text())["input_ids"]


def split(ids: List[int], window: int, tokens: Optional[int] = None) -> List[List[int]]:
    """The windows that the first `tokens` ids fill (all ids: None)."""
    if tokens is not None and not 2 * window <= tokens <= len(ids):
        raise ValueError(
            f"--tokens {tokens}: give at least two windows of {window}, and at most "
            f"{len(ids)}, the text's length"
        )
    ids = ids[:tokens]
    return [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]


def window_logprobs(url: str, window: List[int]) -> List[float]:
    """Log probability of each token of a window but the first, in nats."""
    request = {
        "input_ids": window,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    response = requests.post(f"{url}/generate", json=request, timeout=TIMEOUT_S)
    response.raise_for_status()
    answer = response.json()["meta_info"]["input_token_logprobs"]
    if [token for _, token, *_ in answer] != window:
        raise ValueError("the server scored other tokens than it was asked for")
    logprobs = [logprob for logprob, *_ in answer[1:]]
    if not all(math.isfinite(logprob) and logprob <= 0 for logprob in logprobs):
        raise ValueError("the server's log probabilities are not all finite and <= 0")
    return logprobs


def measure(
    url: str, window: int = WINDOW, tokens: Optional[int] = None, layers: str = ""
) -> Run:
    """Ask the server at `url` for every window; `layers` is what its log said."""
    response = requests.get(f"{url}/server_info", timeout=TIMEOUT_S)
    response.raise_for_status()
    info = response.json()
    windows = split(tokenize(info["tokenizer_path"]), window, tokens)
    config = AutoConfig.from_pretrained(info["model_path"])
    quantized = info["quantization"] or hasattr(config, "quantization_config")
    backend = info["fp8_gemm_runner_backend"] if quantized else "bf16"
    return Run(
        model=Path(info["model_path"]).name,
        backend=backend,
        device=info["device"],
        version=info["version"],
        layers=layers,
        digest=hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        logprobs=[
            window_logprobs(url, ids)
            for ids in tqdm(windows, desc=backend, unit="window", mininterval=1)
        ],
    )


def save(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run._asdict()))


def load(path: Path) -> Run:
    return Run(**json.loads(path.read_text()))


# Servers of our own.


def use_cpu_stand_ins() -> Dict[str, str]:
    """Make sglang importable here without a CUDA driver; the servers' environment."""
    stand_ins = str(ROOT / "scripts" / "cpu_stand_ins")
    sys.path.insert(0, stand_ins)
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    path = filter(None, [stand_ins, os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join(path)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server(NamedTuple):
    url: str
    layers: str  # what its log says about MXFP8 layers


@contextlib.contextmanager
def server(model: str, backend: str) -> Iterator[Server]:
    """A real server with `--fp8-gemm-backend` on a free port, on the GPU, or on a CPU with
    FlashInfer's kernels emulated; stopped at the end."""
    import torch

    cuda = torch.cuda.is_available()
    env = None if cuda else use_cpu_stand_ins()
    from sglang.srt.utils import kill_process_tree
    from sglang.test.mxfp8_utils import launch_cpu_server
    from sglang.test.test_utils import popen_launch_server

    log, url = io.StringIO(), f"http://127.0.0.1:{free_port()}"
    if cuda:
        flags = ["--fp8-gemm-backend", backend]
        process = popen_launch_server(
            model, url, 1800, other_args=flags, return_stdout_stderr=(log, log)
        )
    else:
        process = launch_cpu_server(model, url, backend, env=env, log=log)
    try:
        line = ROUTING_LINE.search(log.getvalue())
        yield Server(url, line.group() if line else "")
    finally:
        kill_process_tree(process.pid)


def serve_all(
    bf16: Path, mxfp8: Path, window: int, tokens: Optional[int]
) -> Iterator[Run]:
    """A run for bf16 and one for each backend, one server at a time; each is saved."""
    for model, backend in [(bf16, "auto"), *((mxfp8, name) for name in BACKENDS)]:
        with server(str(model), backend) as (url, layers):
            run = measure(url, window, tokens, layers)
        save(run, RUNS / f"{run.backend}.json")
        yield run


# The report.

HEAD = """\
| run | perplexity | mean NLL of a token (nats) | NLL less bf16's | perplexity / bf16's | mean \\|change\\| of a token's log probability |
| --- | --- | --- | --- | --- | --- |"""


def pm(estimate: Estimate, digits: int) -> str:
    return f"{estimate.mean:.{digits}f} ± {estimate.error:.{digits}f}"


def row(run: Run, base: Run) -> str:
    nll = negative_log_likelihood(run.logprobs)
    cells = [run.label, pm(exponential(nll), 2), pm(nll, 4), "", "", ""]
    if run is not base:
        difference = paired_difference(base.logprobs, run.logprobs)
        cells[3] = pm(difference, 4)
        cells[4] = pm(exponential(difference), 4)
        cells[5] = f"{mean_change(base.logprobs, run.logprobs):.3f}"
    return f"| {' | '.join(cells)} |"


def compare(runs: Sequence[Run]) -> str:
    """A Markdown table of the runs, the first one the base of the differences. Raises
    ValueError if they were not asked for the same tokens."""
    base = runs[0]
    if len({run.digest for run in runs}) != 1:
        raise ValueError("the runs were not asked for the same tokens")
    return "\n".join([HEAD, *(row(run, base) for run in runs)])


def identical(runs: Sequence[Run]) -> Iterator[str]:
    """A line for each MXFP8 run after the first one: do its log probabilities differ?"""
    first, *others = [run for run in runs if run.backend != "bf16"] or [None]
    for other in others:
        pairs = token_differences(first.logprobs, other.logprobs)
        changed = sum(d != 0 for window in pairs for d in window)
        total = sum(map(len, pairs))
        same = (
            f"differ in {changed} of {total}" if changed else "are equal, bit for bit"
        )
        yield (
            f"\nThe log probabilities on {first.backend} and on {other.backend} {same}."
        )


def where(runs: Sequence[Run]) -> str:
    """What computed, and what did not."""
    if all(run.device != "cpu" for run in runs):
        import torch

        known = torch.cuda.is_available()
        return (
            f"- GPU: {torch.cuda.get_device_name() if known else 'of another machine'}"
        )
    return (
        "- CPU: **FlashInfer's kernels were emulated in plain torch and nothing ran on "
        "SM100.** The emulation multiplies the same e4m3 values by the same scales, read "
        "from the kernels' layouts, and adds up in fp32: this is what MXFP8 itself costs, "
        "not how the kernels round. It computes one thing for both backends, so that "
        "equal rows show that both layouts were undone rightly, and no more."
    )


def report(runs: Sequence[Run]) -> Iterator[str]:
    """The lines of the result file."""
    windows, scored = len(runs[0].logprobs), len(runs[0].logprobs[0])
    command = shlex.join(["python", "benchmark/mxfp8/accuracy.py", *sys.argv[1:]])
    yield "# Accuracy of MXFP8 on a real model\n"
    yield f"Command: `{command.replace(f'{ROOT}/', '')}`, {datetime.date.today()}\n"
    yield where(runs)
    yield f"- sglang {runs[0].version}, Python {platform.python_version()}"
    yield f"- models: {', '.join(dict.fromkeys(run.model for run in runs))}"
    for run in runs:
        if run.layers:
            yield f"- {run.backend}: {run.layers}"
    yield (
        f"\nReal servers, asked over HTTP for the log probability of each token of "
        f"`text.txt` (Lewis Carroll, 1865): {windows} windows of {scored + 1} tokens that "
        f"do not overlap, {windows * (scored + 1)} tokens, of which {windows * scored} "
        "were scored (a window's first has no context). ± is one standard error, with "
        "windows taken for independent; differences are paired token by token, so the "
        "text's own spread is not in them.\n"
    )
    yield compare(runs)
    yield from identical(runs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--url", help="ask this running server")
    mode.add_argument("--compare", type=Path, nargs="+", metavar="FILE")
    mode.add_argument("--serve", action="store_true", help="launch and ask servers")
    name = "SmolLM2-135M-Instruct"
    parser.add_argument("--bf16", type=Path, default=MODELS / name)
    parser.add_argument("--mxfp8", type=Path, default=MODELS / f"{name}-MXFP8")
    parser.add_argument("--tokens", type=int, help="only the text's first (all of it)")
    parser.add_argument(
        "--window", type=int, default=WINDOW, help="tokens (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="the run's JSON, or the Markdown")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    # Or a server of ours would outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.url:
            run = measure(args.url, args.window, args.tokens)
            if args.output:
                save(run, args.output)
            perplexity = exponential(negative_log_likelihood(run.logprobs))
            print(f"{run.label}: perplexity {pm(perplexity, 3)}")
            return 0
        if args.serve:
            runs = list(serve_all(args.bf16, args.mxfp8, args.window, args.tokens))
        else:
            runs = [load(path) for path in args.compare]
        text = "\n".join(report(runs)) + "\n"
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
