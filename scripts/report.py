#!/usr/bin/env python3
"""Turn a results folder of bench_serving.py into report.md, figures.csv and plots.

Every run is in figures.csv. The report shows medians of the repeats; a ratio is made
within one repeat before its median is taken. What failed or is missing is named. Do not
commit the logs and JSONL files: they name paths. Needs .venv (./scripts/setup.sh).
"""

import argparse
import importlib.util
import json
import re
from pathlib import Path

from in_venv import run_in_venv

if __name__ == "__main__" and importlib.util.find_spec("pandas") is None:
    run_in_venv()

import pandas
from bench_serving import LAYOUT, REHEARSAL
from matplotlib import pyplot

METRICS = {  # fields of bench_serving
    "total_throughput": ("Throughput, in + out (tokens/s)", "more is better"),
    "median_ttft_ms": ("Time to first token (ms)", "less is better"),
    "median_tpot_ms": ("Time per output token (ms)", "less is better"),
}
# Ratios are to the first one of these that was measured.
BASES = ("bf16", "triton", "flashinfer_cutlass")
KEYS = ["case", "concurrency", "repeat"]
# Okabe and Ito's, for the colour-blind, with a darker yellow.
COLORS = "#000000 #7f7f7f #d55e00 #cc79a7 #0072b2 #009e73 #b58900".split()


def load(folder: Path, pattern: str) -> pandas.DataFrame:
    """A row for each file of a run: server, repeat, file, and the numbers in it."""
    rows = []
    for path in sorted(folder.glob(f"*-*/{pattern}")):
        repeat, _, server = path.parent.name.partition("-")
        told = json.loads(path.read_text())
        kept = {k: v for k, v in told.items() if isinstance(v, (int, float, list))}
        row = {"server": server, "repeat": int(repeat), "file": path.name}
        rows.append(kept | row)
    return pandas.DataFrame(rows)


def load_figures(folder: Path) -> pandas.DataFrame:
    """A row for each file of bench_serving, with its case and concurrency."""
    figures = load(folder, "*-c*.jsonl")
    if figures.empty:
        raise SystemExit(f"report.py: {folder} has no figure of bench_serving yet")
    parts = figures.file.str.extract(r"(?P<case>.*)-c(?P<concurrency>\d+)\.jsonl")
    # bench_serving's own `concurrency` is what it reached.
    figures = figures.assign(case=parts.case, concurrency=parts.concurrency.astype(int))
    return figures.sort_values("concurrency", kind="stable", ignore_index=True)


def add_ratios(figures: pandas.DataFrame, base: str) -> None:
    """Add METRIC_ratio: each run by `base`'s in the same repeat, NaN where that lacks."""
    bases = figures[figures.server == base].set_index(KEYS)
    index = pandas.MultiIndex.from_frame(figures[KEYS])
    for metric in METRICS:
        divisors = bases[metric].reindex(index).to_numpy()
        figures[f"{metric}_ratio"] = figures[metric] / divisors


def routing(folder: Path, server: str) -> str:
    """What the server's logs say that its MXFP8 layers run on, or ""."""
    logs = [log.read_text() for log in sorted(folder.glob(f"*-{server}/server-*.log"))]
    return (re.findall("MXFP8 linear layers: (.*)", "\n".join(logs)) or [""])[-1]


def label(name: str, backend: str | None, env: dict, runs_on: str) -> str:
    """The server's name, and what it promises although no layer uses it."""
    layout = env.get(LAYOUT)
    promised = {backend: f" on {backend}", layout: f", {layout} scales"}
    for word in (backend, layout):
        if word not in (None, "auto") and promised[word] not in runs_on:
            return f"{name} (no layer uses {word})"
    return name


def problems(folder: Path, runs: set[str]) -> list[str]:
    """Why runs failed, and the files that a run lacks although others have them."""
    lines = []
    for failed in sorted(folder.glob("*-*/failed.txt")):
        why = failed.read_text().splitlines()[0]
        lines.append(f"- `{failed.parent.name}` failed: {why}")
    files = {path.name for path in folder.glob("*-*/*.json*") if path.suffix != ".log"}
    for run in sorted(runs):
        if lacks := sorted(f for f in files if not (folder / run / f).exists()):
            lines.append(f"- `{run}` lacks {', '.join(lacks)}")
    return lines


def number(value: float) -> str:
    """Four digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: pandas.DataFrame) -> str:
    return rows.fillna("").to_markdown(index=False, disable_numparse=True)


def serving_table(figures: pandas.DataFrame, base: str | None) -> str:
    """By concurrency and server: medians of the repeats."""
    grouped = figures.groupby(["concurrency", "server"], sort=False)
    columns = {}
    for metric, (title, _) in METRICS.items():
        columns[title] = grouped[metric].median().map(number)
        if base:
            ratio = grouped[f"{metric}_ratio"].median().map("{:.3f}".format)
            columns[f"{title.split(' (')[0]} / {base}"] = ratio.replace("nan", "")
    return table(pandas.DataFrame(columns).reset_index())


def updated_table(updated: pandas.DataFrame) -> str:
    """By run: the updates' seconds, and GSM8K with the binomial error of one run."""
    rows = updated[["server", "repeat"]].copy()
    rows["updates from disk (s)"] = [" ".join(map(number, s)) for s in updated.update_s]
    if "accuracy" in updated:
        share = updated.accuracy
        error = (share * (1 - share) / updated.questions) ** 0.5
        rows["GSM8K ± error"] = [f"{s:.3f} ± {e:.3f}" for s, e in zip(share, error)]
        rows["without an answer"] = updated.invalid.map(number)
        rows["questions"] = updated.questions.map(number)
    return table(rows)


def draw(
    figures: pandas.DataFrame, metric: str, labels: dict, base: str | None
) -> pyplot.Figure:
    """A panel for each case, with bars from zero: the ratio to `base`, or the metric."""
    title, better = METRICS[metric]
    figure, panels = pyplot.subplots(
        1, figures.case.nunique(), figsize=(13, 5), layout="constrained", squeeze=False
    )
    for axes, (case, here) in zip(panels[0], figures.groupby("case", sort=False)):
        field = f"{metric}_ratio" if base else metric
        grouped = here.groupby(["concurrency", "server"])[field]
        median, low, high = (
            frame.unstack()[[*labels]].rename(columns=labels)
            for frame in (grouped.median(), grouped.min(), grouped.max())
        )
        errors = [[median[c] - low[c], high[c] - median[c]] for c in median]
        median.plot.bar(ax=axes, color=COLORS, yerr=errors, legend=False, rot=0)
        axes.set(title=case, xlabel="Concurrency (requests)", ylabel=title)
        if base:
            axes.set_ylabel(f"{title.split(' (')[0]}, ratio to {base} ({better})")
            axes.axhline(1, color="black", linewidth=1.2)
        axes.spines[["top", "right"]].set_visible(False)
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def write_plots(folder: Path, figures: pandas.DataFrame, *drawn) -> None:
    (folder / "plots").mkdir(exist_ok=True)
    for metric in METRICS:
        figure = draw(figures, metric, *drawn)
        if figures.rehearsal.any():
            figure.suptitle(REHEARSAL, weight="bold")
        figure.savefig(folder / "plots" / f"{metric}.png", dpi=120)
        pyplot.close(figure)


def write_report(folder: Path) -> Path:
    """Write report.md, figures.csv and plots/ into `folder`; returns report.md."""
    environment = json.loads((folder / "environment.json").read_text())
    servers = environment["all_servers"]
    figures, updated = load_figures(folder), load(folder, "updated.json")
    measured = [name for name in servers if (figures.server == name).any()]
    bases = [name for name in BASES if name in measured and len(measured) > 1]
    base = bases[0] if bases else None
    if base:
        add_ratios(figures, base)
    figures.insert(0, "rehearsal", environment["rehearse"])
    figures.to_csv(folder / "figures.csv", index=False)
    runs_on = {name: routing(folder, name) for name in measured}
    labels = {
        name: label(name, *servers[name], f" {runs_on[name]}") for name in measured
    }
    write_plots(folder, figures, labels, base)
    runs = {f"{repeat}-{name}" for repeat in figures.repeat for name in measured}
    parts = [f"# {environment['model']}, TP {environment['tp']}"]
    parts = [REHEARSAL, *parts] if environment["rehearse"] else parts
    parts += ["Medians of the repeats; a ratio is made within one repeat before that."]
    parts += problems(folder, runs) or ["No run failed, and none lacks a file."]
    parts += [f"- {labels[name]}: {text or 'bf16'}" for name, text in runs_on.items()]
    parts += [f"![{metric}](plots/{metric}.png)" for metric in METRICS]
    for case, (tokens_in, tokens_out) in environment["cases"].items():
        here = figures[figures.case == case].replace({"server": labels})
        parts += [f"## {case}: {tokens_in} tokens in, {tokens_out} out"]
        parts += [serving_table(here, base)]
    if not updated.empty:
        parts += ["## Weight updates and accuracy", updated_table(updated)]
    settings = json.dumps(environment, indent=1)
    parts += ["## Machine and settings", f"```\n{settings}\n```"]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    return folder / "report.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what bench_serving.py filled")
    args = parser.parse_args()
    if not (args.results / "environment.json").is_file():
        parser.error(f"{args.results} has no environment.json of bench_serving.py")
    print(f"Wrote {write_report(args.results)}")


if __name__ == "__main__":
    main()
