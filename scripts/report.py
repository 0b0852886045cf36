#!/usr/bin/env python3
"""Turns a results folder of bench_serving_sm100.py into report.md with plots.

Every run is in the tables, whatever it says; runs that are missing or were interrupted
are named. Written into the results folder: report.md, plots/*.png and plots/*.svg.

    scripts/report.py RESULTS
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evidence import Kernel, Results, ResultsError, Run, load_results
from report_plots import BASELINES, REHEARSAL, kernel_name, write_plots

BENCH_FIELDS = (
    "completed",
    "duration",
    "request_throughput",
    "input_throughput",
    "output_throughput",
    "total_throughput",
    "mean_ttft_ms",
    "median_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "median_e2e_latency_ms",
)
Values = dict[str, dict[int, Sequence[float]]]  # by server and repeat


class Metric(NamedTuple):
    """A field of bench_serving, and what it is."""

    field: str
    title: str


METRICS = (
    Metric("total_throughput", "Throughput, input + output, tokens/s (more is better)"),
    Metric("median_ttft_ms", "Time to first token, median, ms (less is better)"),
    Metric("p99_ttft_ms", "Time to first token, p99, ms (less is better)"),
    Metric("median_tpot_ms", "Time per output token, median, ms (less is better)"),
)


def write_report(results: Results) -> Path:
    """Write the report and its plots into the results folder; returns report.md."""
    plots = write_plots(results, results.path / "plots")
    path = results.path / "report.md"
    path.write_text(markdown(results, plots))
    return path


def markdown(results: Results, plots: Sequence[str]) -> str:
    """The report. `plots` are the names of the files in plots/, without their suffix."""
    sections = [
        ("", head(results)),
        ("What was run", what_was_run(results)),
        ("Serving", serving(results, plots)),
        ("Accuracy: GSM8K", accuracy(results)),
        ("Weight updates", updates(results, plots)),
        ("Kernels", kernels(results, plots)),
    ]
    parts = [f"## {title}\n\n{text}" if title else text for title, text in sections]
    text = "\n\n".join(parts)
    return (f"{REHEARSAL}\n\n{text}" if results.plan.rehearsal else text) + "\n"


def head(results: Results) -> str:
    plan, revision = results.plan, results.plan.revision
    planned = plan.repeats * len(plan.servers)
    missing = ", ".join(f"`{name}`" for name in results.missing) or "none"
    kept = ", ".join(f"`{name}`" for name in interrupted(results)) or "none"
    changes = ", with uncommitted changes" if revision.dirty else ""
    return f"""\
# MXFP8 serving: {plan.model}, TP {plan.tp}

- Runs: {len(results.runs)} of {planned} are complete, and every one of them is shown
- Missing: {missing}
- Interrupted, and kept beside them without being counted: {kept}
- Revision: {revision.git}{changes}; wheel {revision.wheel}
- Repeats: {plan.repeats}, the servers in another order each time; ratios are of medians"""


def interrupted(results: Results) -> list[str]:
    """The folders of attempts that were cut off."""
    return sorted(p.name for p in (results.path / "runs").glob("*.interrupted-*"))


def what_was_run(results: Results) -> str:
    return "\n\n".join(
        [
            "### Machines",
            environments(results),
            "### Launches",
            launches(results),
        ]
    )


def environments(results: Results) -> str:
    """A row for each session that measured."""
    rows = []
    for index, found in enumerate(results.environments):
        gpus = [
            f"{gpu.name}, driver {gpu.driver}, {gpu.memory_mib or '?'} MiB, SM "
            f"{gpu.sm_clock_mhz or '?'} MHz, memory {gpu.mem_clock_mhz or '?'} MHz, "
            f"{gpu.power_limit_w or '?'} W"
            for gpu in found.gpu
        ]
        versions = [f"{name} {found.versions[name]}" for name in sorted(found.versions)]
        software = f"Python {found.python}; CUDA {found.cuda}; {', '.join(versions)}"
        rows.append(
            [
                *(index, found.started, "<br>".join(gpus) or "no GPU"),
                *(f"{found.cpu}, {found.cores} cores", software, f"`{found.command}`"),
            ]
        )
    header = ["", "started", "GPUs, clocks as found", "CPU", "software", "command"]
    return table(header, rows)


def launches(results: Results) -> str:
    rows = [
        [
            *(f"`{run.path.name}`", run.launch.environment, run.launch.started),
            *(number(run.launch.ready_s), code(run.launch.flags)),
            code(f"{k}={v}" for k, v in run.launch.env.items()),
            run.launch.routing or "-",
        ]
        for run in results.runs
    ]
    rows += [[f"`{name}`", "missing", *["-"] * 5] for name in results.missing]
    header = ["run", "machine", "started", "ready after s", "flags", "environment"]
    return table([*header, "what its log says of MXFP8 layers"], rows)


def code(words: Iterable[str]) -> str:
    text = " ".join(words)
    return f"`{text}`" if text else "-"


def serving(results: Results, plots: Sequence[str]) -> str:
    """Plots, a table for each case and metric, and every other figure of every run."""
    parts = [picture("throughput", plots), picture("ttft", plots)]
    for case in results.plan.cases:
        title = f"{case.name}: {case.input_len} tokens in, {case.output_len} out"
        parts.append(f"### {title}")
        for metric in METRICS:
            parts += [f"**{metric.title}**", metric_table(results, case.name, metric)]
    parts.append(folded("Everything that every run says", every_run(results)))
    return "\n\n".join(filter(None, parts))


def metric_table(results: Results, case: str, metric: Metric) -> str:
    """A metric of one case: rows by concurrency and server, every run in a column."""

    def values(run: Run, concurrency: int) -> Sequence[float]:
        return (getattr(run.bench[case, concurrency], metric.field),)

    rows = []
    for c in results.plan.concurrencies:
        found = by_server(results, lambda run, c=c: values(run, c))
        rows += [[c, *row] for row in comparison(found, results.plan.repeats)]
    return table(["concurrency", *comparison_header(results.plan.repeats)], rows)


def by_server(results: Results, values: Callable[[Run], Sequence[float]]) -> Values:
    found: Values = {server.name: {} for server in results.plan.servers}
    for run in results.runs:
        found[run.launch.server][run.launch.repeat] = values(run)
    return found


def comparison_header(repeats: int) -> list[str]:
    runs = [f"run {repeat}" for repeat in range(1, repeats + 1)]
    return ["server", *runs, "median", "min..max", *(f"/ {b}" for b in BASELINES)]


def comparison(found: Values, repeats: int) -> Iterator[list[str]]:
    """For each server: each run, the median, the spread, and the ratio to baselines."""
    medians = {name: median(flat(runs)) for name, runs in found.items()}
    for name, runs in found.items():
        cells = [
            ", ".join(map(number, runs[repeat])) if repeat in runs else "missing"
            for repeat in range(1, repeats + 1)
        ]
        yield [name, *cells, number(medians[name]), spread(flat(runs))] + [
            ratio(medians[name], medians.get(base)) for base in BASELINES
        ]


def flat(runs: dict[int, Sequence[float]]) -> list[float]:
    return [value for repeat in sorted(runs) for value in runs[repeat]]


def every_run(results: Results) -> str:
    rows = [
        [
            *(f"`{run.path.name}`", case, concurrency),
            *(number(getattr(bench, field)) for field in BENCH_FIELDS),
        ]
        for run in results.runs
        for (case, concurrency), bench in run.bench.items()
    ]
    return table(["run", "case", "concurrency", *BENCH_FIELDS], rows)


def accuracy(results: Results) -> str:
    """GSM8K by run. Repeats ask the same questions, so they are not added up."""
    plan = results.plan.gsm8k
    if plan is None:
        return "Not planned."
    rows = []
    for run in results.runs:
        got = run.gsm8k
        error = binomial_error(got.correct, got.questions)
        rows.append(
            [
                *(run.launch.server, run.launch.repeat),
                f"{got.correct} of {got.questions}",
                f"{got.correct / got.questions:.3f} ± {error:.3f}",
                *(got.invalid, number(got.seconds)),
            ]
        )
    rows.sort(key=lambda row: [s.name for s in results.plan.servers].index(row[0]))
    header = ["server", "run", "correct", "accuracy ± standard error"]
    asked = (
        f"{plan.questions} questions of {plan.file}, {plan.shots} shots. The error is "
        "binomial, of one run: sqrt(p (1 - p) / n). All runs ask the same questions."
    )
    return f"{asked}\n\n{table([*header, 'without an answer', 'seconds'], rows)}"


def binomial_error(correct: int, questions: int) -> float:
    """The standard error of the share of `correct` answers among `questions`."""
    share = correct / questions
    return math.sqrt(share * (1 - share) / questions)


def updates(results: Results, plots: Sequence[str]) -> str:
    if not results.plan.updates:
        return "Not planned."
    found = by_server(results, lambda run: run.updates)
    repeats = results.plan.repeats
    rows = list(comparison(found, repeats))
    text = (
        f"`/update_weights_from_disk` of the whole model, seconds, "
        f"{results.plan.updates} in each run (less is better)."
    )
    parts = [text, picture("updates", plots), table(comparison_header(repeats), rows)]
    return "\n\n".join(filter(None, parts))


def kernels(results: Results, plots: Sequence[str]) -> str:
    """Every kernel by shape, beside this device's copy and bf16 products."""
    rows = results.kernels
    if not rows:
        return "Not measured: kernels.jsonl is missing."
    devices = ", ".join(dict.fromkeys(row.device for row in rows))
    parts = [
        f"`bench_mxfp8_linear.py` on {devices}. {KERNEL_NOTE}",
        *(picture(f"kernel-{part}", plots) for part in ("linear", "gemm", "quantize")),
    ]
    absent = sorted(set(KERNELS) - {kernel_name(row) for row in rows})
    if absent:
        parts.append(f"Not measured: {', '.join(absent)}.")
    for n, k in dict.fromkeys((row.n, row.k) for row in rows):
        here = [row for row in rows if (row.n, row.k) == (n, k)]
        title = f"[N, K] = [{n}, {k}]" if n else "Copy"
        parts.append(folded(title, kernel_table(here, *peaks(rows))))
    return "\n\n".join(filter(None, parts))


KERNEL_NOTE = (
    "CUDA graphs, weights out of the L2 cache; emulated on the CPU in a rehearsal. The "
    "peaks are the copy's GB/s and the fastest bf16 product's TFLOP/s. Every repetition "
    "is in kernels.jsonl; in a plot, a bar is the range of more than ten."
)
KERNELS = (*BASELINES, "flashinfer_trtllm_8x4", "flashinfer_trtllm_128x4")


def peaks(rows: Iterable[Kernel]) -> tuple[float, float]:
    """GB/s of the fastest copy, and TFLOP/s of the fastest bf16 product; 0 without."""
    rows = list(rows)
    copies = [row.bytes / median(row.us) / 1e3 for row in rows if row.part == "copy"]
    products = [
        row.flops / median(row.us) / 1e6 for row in rows if row.part == "bf16_gemm"
    ]
    return max(copies, default=0.0), max(products, default=0.0)


def kernel_table(rows: Sequence[Kernel], copy: float, product: float) -> str:
    medians = {(row.part, row.m, kernel_name(row)): median(row.us) for row in rows}
    lines = []
    for row in sorted(rows, key=lambda row: row.m):
        us = median(row.us)
        gbs = row.bytes / us / 1e3 if row.bytes else None
        tflops = row.flops / us / 1e6 if row.flops else None
        bases = [medians.get((row.part, row.m, base)) for base in BASELINES]
        lines.append(
            [
                *(row.m if row.n else "", row.part, kernel_name(row), len(row.us)),
                *(number(us), spread(row.us)),
                *(number(gbs), percent(gbs, copy)),
                *(number(tflops), percent(tflops, product)),
                *(ratio(us, base) for base in bases),
            ]
        )
    header = ["M", "part", "kernel", "repetitions", "median us", "min..max us", "GB/s"]
    header += ["of the copy's", "TFLOP/s", "of bf16's peak"]
    return table([*header, *(f"/ {base}" for base in BASELINES)], lines)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def number(value: float | None) -> str:
    """Four digits, without an exponent; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread(values: Sequence[float]) -> str:
    return f"{number(min(values))}..{number(max(values))}" if values else "-"


def ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else "-"


def percent(value: float | None, of: float) -> str:
    return f"{value / of:.0%}" if value is not None and of else "-"


def picture(name: str, plots: Sequence[str]) -> str:
    if name not in plots:
        return ""
    return f"![{name}](plots/{name}.png)\n\n[{name}.svg](plots/{name}.svg)"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what would break it is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="what bench_serving_sm100.py filled")
    path = parser.parse_args().results
    if not path.is_dir():
        parser.error(f"{path} is no folder")
    try:
        results = load_results(path)
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 1
    if results.missing:
        print(f"Not complete, and named so: {', '.join(results.missing)}")
    print(f"Wrote {write_report(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
