"""The plots of report.py, as PNG and SVG, readable on a white and on a dark page.

The background is transparent and every colour is of middle brightness. Servers differ in
colour (Okabe and Ito's, for the colour-blind), marker and line. A point is a run, a line
joins medians. Nothing in a file depends on when or where it was drawn.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import matplotlib
from evidence import Kernel, Results

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

REHEARSAL = "REHEARSAL: CPU, kernels emulated; says nothing about speed"
TEXT = "#7a7a7a"
SERVING = {  # by file: a field of bench_serving, and its axis
    "throughput": ("total_throughput", "Throughput, input + output (tokens/s)"),
    "ttft": ("median_ttft_ms", "Time to first token, median (ms)"),
}
FEW = 10  # up to here every repetition of a kernel is a point, beyond it a range
LOG_FROM = 20  # a factor between largest and smallest from which an axis is logarithmic
SETTINGS = {
    "figure.dpi": 110,
    "savefig.transparent": True,
    "svg.hashsalt": "mxfp8",
    "font.family": "DejaVu Sans",  # it comes with matplotlib
    "font.size": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.color": TEXT,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), TEXT),
    **dict.fromkeys(("xtick.color", "ytick.color"), TEXT),
}


BASELINES = ("triton", "flashinfer_cutlass")
Points = dict[int, Sequence[float]]  # every value, by what is on the x axis


class Style(NamedTuple):
    color: str
    marker: str
    line: str | tuple = "-"


STYLES = {
    "triton": Style("#d55e00", "o"),
    "flashinfer_cutlass": Style("#b7679a", "s", "--"),
    "flashinfer_trtllm": Style("#0a7cc4", "D", (0, (9, 2))),
    "flashinfer_trtllm_8x4": Style("#009e73", "^", "-."),
    "flashinfer_trtllm_128x4": Style("#948000", "v", (0, (4, 1, 1, 1, 1, 1))),
    "bf16 (torch)": Style("#808080", "x", ":"),
}
OTHER = Style("#808080", "P", ":")


def style_of(name: str) -> Style:
    return STYLES.get(name, OTHER)


def kernel_name(row: Kernel) -> str:
    """A kernel's backend and layout, as the server that always uses them is named."""
    if row.backend == "torch":
        return "copy (torch)" if row.part == "copy" else "bf16 (torch)"
    return f"flashinfer_trtllm_{row.layout}" if "trtllm" in row.backend else row.backend


def write_plots(results: Results, folder: Path) -> list[str]:
    """Write NAME.png and NAME.svg into `folder`, in place of those there, for what there
    are results of; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    figures: dict[str, Callable[[], Figure]] = {}
    if results.runs:
        for name, (field, label) in SERVING.items():
            figures[name] = partial(serving_figure, results, field, label)
    if any(run.updates for run in results.runs):
        figures["updates"] = partial(update_figure, results)
    for part in ("linear", "gemm", "quantize"):
        if any(row.part == part for row in results.kernels):
            figures[f"kernel-{part}"] = partial(kernel_figure, results, part)
    with matplotlib.rc_context(SETTINGS):
        for name, draw in figures.items():
            save(draw(), folder / name, results.plan.rehearsal)
    return list(figures)


def save(figure: Figure, path: Path, rehearsal: bool) -> None:
    if rehearsal:
        figure.suptitle(REHEARSAL, color=TEXT, weight="bold", fontsize=12)
        mark = {"fontsize": 64, "weight": "bold", "rotation": 20, "alpha": 0.13}
        figure.text(0.5, 0.5, "REHEARSAL", color=TEXT, ha="center", va="center", **mark)
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


def serving_figure(results: Results, field: str, label: str) -> Figure:
    """`field` of bench_serving against the concurrency: a column of panels for each case,
    below it the same as a ratio to the first baseline that was measured."""
    plan, rows = results.plan, 1
    measured = {run.launch.server for run in results.runs}
    base = next((name for name in BASELINES if name in measured), None)
    if base and len(measured) > 1:
        rows = 2
    figure, panels = grid(rows * len(plan.cases), len(plan.cases))
    upper, lower = panels[: len(plan.cases)], panels[len(plan.cases) :]
    for axes, below, case in zip_longest(upper, lower, plan.cases):
        points = serving_points(results, case.name, field)
        draw_servers(axes, points, label)
        axes.set_title(f"{case.name}: {case.input_len} in, {case.output_len} out")
        if below:
            medians = {c: statistics.median(v) for c, v in points[base].items()}
            draw_servers(below, divided(points, medians), f"Ratio to {base}'s median")
    legend(figure, [server.name for server in plan.servers])
    return figure


def serving_points(results: Results, case: str, field: str) -> dict[str, Points]:
    """By server, the value of every run at each concurrency."""
    found: dict[str, Points] = {server.name: {} for server in results.plan.servers}
    for run in results.runs:
        for c in results.plan.concurrencies:
            value = getattr(run.bench[case, c], field)
            found[run.launch.server].setdefault(c, []).append(value)
    return found


def divided(points: Mapping[str, Points], by: Mapping[int, float]) -> dict[str, Points]:
    """`points` as ratios; where the divisor is 0 there is none."""
    return {
        name: {c: [v / by[c] for v in values] for c, values in own.items() if by[c]}
        for name, own in points.items()
    }


def draw_servers(axes: Axes, points: Mapping[str, Points], label: str) -> None:
    for place, name in spread(list(points)):
        draw_series(axes, name, points[name], place)
    ticks = {c for own in points.values() for c in own}
    doubling_axis(axes, "Concurrency (requests)", ticks)
    axes.set_ylabel(label)
    if not label.startswith("Ratio"):
        value_axis(axes)


def update_figure(results: Results) -> Figure:
    """Every update of every run, and the median by server."""
    names = [server.name for server in results.plan.servers]
    figure, (axes,) = grid(1, columns=1)
    for x, name in enumerate(names):
        runs = [run for run in results.runs if run.launch.server == name]
        if not runs:
            continue
        style, everything = style_of(name), [s for run in runs for s in run.updates]
        for run in runs:
            middle = (results.plan.repeats + 1) / 2
            at = x + 0.3 * (run.launch.repeat - middle) / results.plan.repeats
            draw_points(axes, at, run.updates, style)
        height = statistics.median(everything)
        axes.hlines(height, x - 0.3, x + 0.3, style.color, lw=2)
    labels = [name.replace("flashinfer_", "flashinfer_\n") for name in names]
    axes.set_xticks(range(len(names)), labels)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_title("/update_weights_from_disk")
    axes.set_ylabel("Time of an update (s)")
    value_axis(axes)
    return figure


def kernel_figure(results: Results, part: str) -> Figure:
    """A panel per shape: the time of `part` against M, by backend and layout."""
    parts = (part,) if part == "quantize" else (part, "bf16_gemm")
    of_part = [row for row in results.kernels if row.part == part]
    shapes = list(dict.fromkeys((row.n, row.k) for row in of_part))
    rows = [row for row in results.kernels if row.part in parts]
    names = [name for name in STYLES if name in map(kernel_name, rows)]
    figure, panels = grid(len(shapes), columns=3 if len(shapes) > 4 else 2)
    for axes, shape in zip(panels, shapes):
        here = [row for row in rows if (row.n, row.k) == shape]
        for name in names:
            points = {row.m: row.us for row in here if kernel_name(row) == name}
            draw_series(axes, name, points, 0)
        axes.set_title(f"{part} [{shape[0]}, {shape[1]}]")
        doubling_axis(axes, "M (tokens)", {row.m for row in here})
        axes.set_yscale("log")
        axes.set_ylabel("Time of a call (us)")
        value_axis(axes)
    legend(figure, names)
    return figure


def grid(panels: int, columns: int) -> tuple[Figure, Sequence[Axes]]:
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    size = max(7.5, 5.2 * columns), 4.2 * rows + 0.8
    figure = plt.figure(
        figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for unused in axes.flat[panels:]:
        unused.set_axis_off()
    return figure, list(axes.flat[:panels])


def spread(names: Sequence[str]) -> Iterable[tuple[float, str]]:
    """Each name with its place beside the others, -1..1, so that points do not hide."""
    middle = (len(names) - 1) / 2 or 1
    return [((i - middle) / middle, name) for i, name in enumerate(names)]


def draw_points(axes: Axes, x: float, values: Sequence[float], style: Style) -> None:
    axes.plot([x] * len(values), values, style.marker, color=style.color, alpha=0.65)


def draw_series(axes: Axes, name: str, points: Points, place: float) -> None:
    """Every value of `points` at its x, and a line through their medians."""
    style, line = style_of(name), []
    for x in sorted(points):
        at, values = x * 2 ** (0.12 * place), points[x]
        line.append((at, statistics.median(values)))
        if len(values) <= FEW:
            draw_points(axes, at, values, style)
        else:
            axes.vlines(at, min(values), max(values), style.color, lw=3, alpha=0.5)
            axes.plot(*line[-1], style.marker, color=style.color)
    if line:
        axes.plot(*zip(*line), color=style.color, ls=style.line)


def doubling_axis(axes: Axes, label: str, ticks: Iterable[int]) -> None:
    ticks = sorted(ticks)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(label)
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
    shown = ticks[:: math.ceil(len(ticks) / 8)]
    axes.set_xticks(shown, [str(tick) for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def value_axis(axes: Axes) -> None:
    """Let y begin at 0, or be logarithmic where the values differ by much."""
    low, high = axes.dataLim.intervaly
    if axes.get_yscale() == "log" or (low > 0 and high / low > LOG_FROM):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif math.isfinite(high):
        axes.set_ylim(0, high * 1.08)


def legend(figure: Figure, names: Iterable[str]) -> None:
    handles = [
        Line2D([], [], color=s.color, marker=s.marker, ls=s.line, label=name)
        for name, s in ((name, style_of(name)) for name in names)
    ]
    columns = max(1, int(figure.get_figwidth() / 2.9))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False
    )
