"""scripts/report.py on invented figures, which their model's name says."""

import json
import re
import shutil

import bench_serving
import pandas
import pytest
import report

SPEED = {"bf16": 100, "triton": 98, "flashinfer_trtllm_8x4": 139}
CASES = bench_serving.FULL["cases"]
ENVIRONMENT = {"model": "INVENTED", "tp": 1, "rehearse": True, "cases": CASES}
ENVIRONMENT["all_servers"] = bench_serving.SERVERS


@pytest.fixture
def folder(tmp_path):
    """Three repeats of all servers; the machine gets slower from one to the next."""
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    updated = {"update_s": [1.5, 1.25], "questions": 100, "accuracy": 0.5, "invalid": 0}
    for repeat in (1, 2, 3):
        for server, speed in SPEED.items():
            run = tmp_path / f"{repeat}-{server}"
            run.mkdir()
            (run / "updated.json").write_text(json.dumps(updated))
            speed *= 1.1 - repeat / 10
            row = {"median_ttft_ms": 9e3 / speed, "median_tpot_ms": 500 / speed}
            row |= {"server_info": {"host": "h"}, "request_rate": float("inf")}
            for case in CASES:
                for c in (1, 8):
                    row |= {"total_throughput": speed * c, "concurrency": c - 0.01}
                    (run / f"{case}-c{c}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def text_of(folder, monkeypatch):
    """Makes the report, without plots."""
    monkeypatch.setattr(report, "write_plots", lambda *_: None)
    return lambda: report.write_report(folder).read_text()


def triton_row(text: str, concurrency: int) -> list[str]:
    """The figures of triton in the decode-heavy case."""
    table = text[text.index("## decode") :]
    line = re.search(rf"(?m)^\| {concurrency} +\| triton[ (].*$", table)[0]
    return [cell.strip() for cell in line.strip("|").split("|")][2:]


def test_figures_are_medians_and_ratios_are_of_one_repeat(folder, text_of):
    row = triton_row(text_of(), 8)
    assert float(row[0]) == pytest.approx(98 * 0.9 * 8, rel=1e-3)
    assert row[1] == "0.980" and row[3] == f"{100 / 98:.3f}"
    figures = pandas.read_csv(folder / "figures.csv")
    assert len(figures) == 36 and set(figures.concurrency) == {1, 8}
    # The two medians are now of other repeats; a ratio of them would be another one.
    shutil.rmtree(folder / "2-bf16")
    (folder / "3-triton" / "decode-c8.jsonl").unlink()
    assert triton_row(text_of(), 8)[1] == "0.980"


def test_a_name_that_promises_what_no_layer_uses_says_so(folder, text_of):
    server = "flashinfer_trtllm_8x4"
    for layers, name in (
        ("4 on flashinfer_trtllm, 8x4 scales up to M = 9", server),
        ("4 on flashinfer_trtllm, 128x4 scales", f"{server} (no layer uses 8x4)"),
    ):
        log = folder / f"1-{server}" / "server-1.log"
        log.write_text(f"[now] MXFP8 linear layers: {layers}\n")
        text = text_of()
        assert f"\n- {name}: {layers}\n" in text and f"| {name} " in text


def test_what_failed_or_is_missing_is_named(folder, text_of):
    assert "| 0.500 ± 0.050 " in text_of()
    (folder / "3-triton" / "prefill-c8.jsonl").unlink()
    shutil.rmtree(folder / "2-bf16")
    (folder / "2-bf16").mkdir()
    (folder / "2-bf16" / "failed.txt").write_text("it did not start\nits log")
    text = text_of()
    assert "- `2-bf16` failed: it did not start\n" in text
    assert "- `2-bf16` lacks decode-c1.jsonl, " in text
    assert "- `3-triton` lacks prefill-c8.jsonl\n" in text
    assert "nan" not in text


def test_plots_are_fair_and_a_rehearsal_says_so(folder):
    assert report.write_report(folder).read_text().startswith(report.REHEARSAL)
    figures = pandas.read_csv(folder / "figures.csv")
    assert figures.rehearsal.all() and len(list(folder.glob("plots/*.png"))) == 3
    labels = {name: name for name in SPEED}
    axes = report.draw(figures, "total_throughput", labels, "bf16").axes[0]
    assert axes.get_ylim()[0] == 0 and len(axes.patches) == 6
    assert any(list(line.get_ydata()) == [1, 1] for line in axes.lines)
