"""scripts/report.py: every run is shown, the figures are right, the plots are readable.

The results are made up, which their model's name says.
"""

import dataclasses
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import report
import report_plots
from evidence import Kernel, load_results
from PIL import Image

ROOT = Path(__file__).parents[2]
SERVERS = (
    "triton",
    "flashinfer_cutlass",
    "flashinfer_trtllm",
    "flashinfer_trtllm_8x4",
    "flashinfer_trtllm_128x4",
)
CASES = {"prefill": (4096, 64), "decode": (128, 1024)}
CONCURRENCIES = (1, 8, 32, 128)
PAGES = {"white": (255, 255, 255), "dark": (0x0D, 0x11, 0x17)}


def made_up_plan(rehearsal: bool = False, servers=SERVERS, repeats: int = 3) -> dict:
    return {
        "schema": 1,
        "rehearsal": rehearsal,
        "model": "MADE-UP-NUMBERS",
        "tp": 1,
        "repeats": repeats,
        "revision": {"git": "0" * 40, "dirty": False, "wheel": "f" * 64},
        "servers": [
            {"name": s, "flags": ["--made-up", s], "env": {"A": "a|b"}} for s in servers
        ],
        "cases": [
            {"name": name, "input_len": lens[0], "output_len": lens[1]}
            for name, lens in CASES.items()
        ],
        "concurrencies": list(CONCURRENCIES),
        "gsm8k": {"questions": 200, "shots": 5, "file": "made-up.jsonl"},
        "updates": 2,
    }


def made_up_bench(case: str, concurrency: int, speed: float) -> dict:
    """A line of bench_serving, and a field that the schema does not name."""
    lens, rate = CASES[case], speed * concurrency**0.7
    times = {
        f"{what}_{field}_ms": time * 1000 * concurrency**0.4 / speed
        for field, time in (("ttft", 2.0), ("tpot", 0.5), ("itl", 0.5))
        for what in ("mean", "median", "p99")
    }
    return {
        "completed": 4 * concurrency,
        "duration": 12.5,
        "max_concurrency": concurrency,
        "random_input_len": lens[0],
        "random_output_len": lens[1],
        "total_input_tokens": 4 * concurrency * lens[0],
        "total_output_tokens": 4 * concurrency * lens[1],
        "request_throughput": rate / 100,
        "input_throughput": rate * lens[0] / sum(lens),
        "output_throughput": rate * lens[1] / sum(lens),
        "total_throughput": rate,
        "median_e2e_latency_ms": 1e4 / speed,
        "backend": "sglang",
        **times,
    }


def made_up_kernels(rehearsal: bool) -> list[dict]:
    chance, repeats = random.Random(1), 3 if rehearsal else 50
    kinds = [(name, None) for name in SERVERS[:1]]
    kinds += [("flashinfer_cutlass", "128x4")]
    kinds += [("flashinfer_trtllm", layout) for layout in ("8x4", "128x4")]
    rows = [("copy", "torch", None, 1, None, None, 500.0, 1 << 31, None)]
    for n, k in ((768, 4096), (6144, 4096), (1280, 8192), (57344, 8192)):
        for m in (1, 8, 64, 512, 4096):
            flops, bytes = 2 * m * n * k, n * k + m * (n + k)
            least = max(bytes / 6e6, flops / 2e9) + 3
            rows.append(("bf16_gemm", "torch", None, m, n, k, 2 * least, bytes, flops))
            for i, (backend, layout) in enumerate(kinds):
                for part, share in (("quantize", 0.2), ("gemm", 0.8), ("linear", 1.0)):
                    us = share * least * (1.6 - i / 10 + (layout == "8x4") * m / 1e4)
                    rows.append((part, backend, layout, m, n, k, us, bytes, flops))
    fields = [field.name for field in dataclasses.fields(Kernel)]
    return [
        dict(zip(fields, (*row[:6], us, *row[7:], "a made-up GPU", rehearsal)))
        for row in rows
        for us in [[row[6] * chance.uniform(0.97, 1.1) for _ in range(repeats)]]
    ]


def write(path: Path, content, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = content if lines else [content]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up_results(path: Path, **settings) -> Path:
    """A complete results folder of invented numbers."""
    plan, chance = made_up_plan(**settings), random.Random(0)
    write(path / "plan.json", plan)
    gpu = {"name": "a made-up GPU", "driver": "1.2", "memory_mib": 1.0}
    gpu |= {"sm_clock_mhz": 2.0, "mem_clock_mhz": None, "power_limit_w": 4.0}
    write(
        path / "environments.jsonl",
        {
            "started": "2026-01-01T00:00:00+00:00",
            "gpu": [] if plan["rehearsal"] else [gpu],
            "cpu": "a CPU",
            "cores": 2,
            "python": "3.11",
            "versions": {"sglang": "0.5.9", "torch": "2.9.1"},
            "cuda": None,
            "command": "bench_serving_sm100.py",
        },
    )
    for repeat in range(1, plan["repeats"] + 1):
        for place, server in enumerate(plan["servers"]):
            speed = 100 * (1 + place / 10) * chance.uniform(0.97, 1.03)
            made_up_run(path, repeat, server, speed)
    write(path / "kernels.jsonl", made_up_kernels(plan["rehearsal"]), lines=True)
    return path


def made_up_run(path: Path, repeat: int, server: dict, speed: float) -> None:
    folder = path / "runs" / f"{repeat}-{server['name']}"
    launch = {"server": server["name"], "repeat": repeat, "environment": 0}
    launch |= {"flags": server["flags"], "env": server["env"], "ready_s": 50.0}
    routing = "MXFP8 linear layers: made up"
    write(folder / "launch.json", {**launch, "started": "now", "routing": routing})
    for case in CASES:
        for c in CONCURRENCIES:
            row = made_up_bench(case, c, speed)
            write(folder / f"bench-{case}-c{c}.jsonl", row)
    score = {"questions": 200, "correct": 150 + repeat, "invalid": 1}
    score |= {"accuracy": (150 + repeat) / 200, "seconds": 9.0}
    write(folder / "gsm8k.json", score)
    write(folder / "updates.json", {"seconds": [300 / speed, 310 / speed]})
    (folder / "done").touch()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    path = made_up_results(tmp_path_factory.mktemp("report") / "results")
    report.write_report(load_results(path))
    return path


@pytest.fixture
def folder(results, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(results, tmp_path / "results"))


def run_script(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts/report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows_after(text: str, title: str) -> list[list[str]]:
    """The cells of the first table behind `title`, without its head."""
    lines = text[text.index(title) :].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_every_run_is_in_the_table_with_its_median_spread_and_ratios(results):
    text = (results / "report.md").read_text()
    loaded = load_results(results)
    rows = rows_after(text[text.index("### decode") :], "**Throughput")
    assert len(rows) == len(CONCURRENCIES) * len(SERVERS)
    by_key = {(int(row[0]), row[1]): row[2:] for row in rows}
    for (concurrency, server), cells in by_key.items():
        values = {
            name: [
                run.bench["decode", concurrency].total_throughput
                for run in loaded.runs
                if run.launch.server == name
            ]
            for name in SERVERS
        }
        mine, medians = values[server], map(statistics.median, values.values())
        medians = dict(zip(values, medians))
        assert sorted(map(float, cells[:3])) == pytest.approx(sorted(mine), rel=1e-3)
        assert float(cells[3]) == pytest.approx(medians[server], rel=1e-3)
        low, high = map(float, cells[4].split(".."))
        assert (low, high) == pytest.approx((min(mine), max(mine)), rel=1e-3)
        ratios = [medians[server] / medians[base] for base in report.BASELINES]
        assert list(map(float, cells[5:])) == pytest.approx(ratios, abs=0.006)


def test_everything_is_there_once_for_each_run(results):
    text = (results / "report.md").read_text()
    everything = rows_after(text, "Everything that every run says")
    assert len(everything) == 15 * len(CASES) * len(CONCURRENCIES)
    assert len(rows_after(text, "### Launches")) == 15
    assert len(rows_after(text, "## Accuracy")) == 15
    assert len(rows_after(text, "## Weight updates")) == 5
    assert "REHEARSAL" not in text
    for file in re.findall(r"\((plots/[^)]+)\)", text):
        assert (results / file).stat().st_size > 0


def test_tables_are_not_broken_by_what_they_hold(results):
    for block in re.findall(r"(?m)(?:^\|.*\n)+", (results / "report.md").read_text()):
        unescaped = [re.sub(r"\\\|", "", line) for line in block.splitlines()]
        assert len({line.count("|") for line in unescaped}) == 1


def test_accuracy_has_its_binomial_error(results):
    assert report.binomial_error(50, 100) == pytest.approx(0.05)
    assert report.binomial_error(7, 7) == 0
    row = rows_after((results / "report.md").read_text(), "## Accuracy")[0]
    assert row == ["triton", "1", "151 of 200", "0.755 ± 0.030", "1", "9"]


def test_missing_and_interrupted_runs_are_named(folder):
    (folder / "runs/2-triton/done").unlink()
    (folder / "runs/3-triton").rename(folder / "runs/3-triton.interrupted-1")
    done = run_script(folder)
    assert done.returncode == 0
    assert "2-triton, 3-triton" in done.stdout
    text = (folder / "report.md").read_text()
    assert "13 of 15" in text
    assert "Missing: `2-triton`, `3-triton`" in text
    assert "`3-triton.interrupted-1`" in text
    rows = [r for r in rows_after(text, "**Throughput") if r[1] == "triton"]
    assert all(row[3:5] == ["missing", "missing"] for row in rows)


def test_without_a_baseline_there_is_no_ratio(tmp_path):
    path = made_up_results(tmp_path, rehearsal=True, servers=SERVERS[1:3], repeats=1)
    assert run_script(path).returncode == 0
    rows = rows_after((path / "report.md").read_text(), "**Throughput")
    assert {(row[1], row[5] == "-", row[6] == "-") for row in rows} == {
        ("flashinfer_cutlass", True, False),
        ("flashinfer_trtllm", True, False),
    }


def test_no_complete_run_is_a_report_too(folder):
    for done in folder.glob("runs/*/done"):
        done.unlink()
    (folder / "kernels.jsonl").unlink()
    shutil.rmtree(folder / "plots")
    assert run_script(folder).returncode == 0
    text = (folder / "report.md").read_text()
    assert "0 of 15" in text
    assert "kernels.jsonl is missing" in text
    assert "![" not in text
    assert not list((folder / "plots").iterdir())


def test_plots_of_an_earlier_report_do_not_stay(folder):
    (folder / "kernels.jsonl").unlink()
    report.write_report(load_results(folder))
    names = {file.stem for file in (folder / "plots").iterdir()}
    assert names == {"throughput", "ttft", "updates"}


def test_a_rehearsal_says_so_first_and_in_every_plot(tmp_path):
    path = made_up_results(tmp_path, rehearsal=True, servers=SERVERS[1:], repeats=1)
    report.write_report(load_results(path))
    text = (path / "report.md").read_text()
    assert text.split("\n")[0] == report.REHEARSAL
    loaded = load_results(path)
    unmarked = dataclasses.replace(
        loaded, plan=dataclasses.replace(loaded.plan, rehearsal=False)
    )
    report_plots.write_plots(unmarked, tmp_path / "unmarked")
    names = [file.name for file in (path / "plots").glob("*.png")]
    assert len(names) == 6
    for name in names:
        marked, plain = path / "plots" / name, tmp_path / "unmarked" / name
        assert not same_picture(marked, plain)


def same_picture(first: Path, second: Path) -> bool:
    a, b = (numpy.asarray(Image.open(file).convert("RGBA")) for file in (first, second))
    return a.shape == b.shape and bool((a == b).all())


def test_plots_are_the_same_bytes_each_time(results, tmp_path):
    for name in report_plots.write_plots(load_results(results), tmp_path):
        for suffix in (".png", ".svg"):
            file = f"{name}{suffix}"
            again = (tmp_path / file).read_bytes()
            assert (results / "plots" / file).read_bytes() == again


def luminance(rgb) -> float:
    """WCAG's relative luminance of 0..255 sRGB."""
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in rgb)
    ]
    return sum(x * y for x, y in zip(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a, b) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", PAGES)
def test_colours_are_readable_on_both_pages(page):
    """WCAG asks 3 of graphics and of large text; 4.35 is the most that one grey has
    on both pages."""
    colors = {style.color: 3.0 for style in report_plots.STYLES.values()}
    colors[report_plots.TEXT] = 4.2
    for color, least in colors.items():
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert contrast(rgb, PAGES[page]) >= least, color


def test_servers_differ_in_more_than_colour():
    styles = report_plots.STYLES.values()
    for field in report_plots.Style._fields:
        assert len({getattr(style, field) for style in styles}) == len(styles)


def test_plots_have_no_background(results):
    for file in (results / "plots").glob("*.png"):
        alpha = numpy.asarray(Image.open(file).convert("RGBA"))[..., 3]
        assert (alpha == 0).mean() > 0.5


def test_broken_results_are_an_error_that_names_the_file(folder):
    file = folder / "runs/1-triton/bench-decode-c8.jsonl"
    file.write_text("{")
    done = run_script(folder)
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr


def test_no_folder_is_a_wrong_argument(tmp_path):
    done = run_script(tmp_path / "none")
    assert done.returncode == 2
    assert "is no folder" in done.stderr
