"""The text of a pull request, from the diff, a results folder and its report."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import report
from evidence import Environment, Results
from pull_request.lint import Checks
from pull_request.series import Part, Series

MARK = (
    "REHEARSAL: made on a CPU with FlashInfer's kernels emulated. It says nothing "
    "about speed, and is not to be sent.\n\n"
)
ITEMS = (  # used where the checkout has no template of its own
    "Code is formatted by pre-commit",
    "Unit tests are added",
    "Documentation is updated",
    "Accuracy and speed are measured",
    "Code follows upstream's style guide",
)


@dataclass(frozen=True)
class Draft:
    """What a pull request is written from. `words` are upstream.toml's [pr], `version`
    the wheel's. `plots` are names, in `plots_folder`/plots. `base` names the commit or
    release that the series starts from, `differ` the files there that are not as they
    were measured; `template` is upstream's own, or ""."""

    words: dict
    version: str
    results: Results
    plots: list[str]
    plots_folder: str
    series: Series
    checks: Checks
    base: str
    differ: tuple[str, ...]
    template: str


def title(draft: Draft) -> str:
    rehearsal = "REHEARSAL, NOT TO BE SENT: " if draft.results.plan.rehearsal else ""
    return f"{rehearsal}{draft.words['title']}\n"


def description(draft: Draft) -> str:
    """The pull request's text, in Markdown."""
    sections = {
        "Motivation": flow(draft.words["motivation"]),
        "Modifications": "\n\n".join(map(_modification, draft.series.parts)),
        "Accuracy Tests": f"GSM8K: {report.accuracy(draft.results)}",
        "Benchmarking and Profiling": _benchmarks(draft),
        "Checklist": _checklist(draft),
    }
    text = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return (MARK if draft.results.plan.rehearsal else "") + text + "\n"


def flow(text: str) -> str:
    """The text without the line breaks inside its paragraphs and list items, which
    GitHub would show."""
    return re.sub(r"(?<=\S)\n *(?!- |\s)", " ", text.strip())


def _modification(part: Part) -> str:
    reasons = "\n\n".join(map(_reason, part.reasons.split("\n\n")))
    summary = f"{len(part.changes)} files, and why each changes"
    return (
        f"### {part.subject}\n\n{flow(part.body)}\n\n{report.folded(summary, reasons)}"
    )


def _reason(text: str) -> str:
    path, _, rest = text.partition("\n")
    name, new = re.fullmatch(r"(\S+)( \(new\))?", path).groups(default="")
    rest = flow(rest)
    rest = re.sub(r"(?m)^- (\w[\w.]*(?:, \w[\w.]*)*): ", r"- `\1`: ", rest)
    return f"**`{name}`**{new}\n\n{rest}".rstrip()


def _benchmarks(draft: Draft) -> str:
    results, plots = draft.results, draft.plots
    parts = [
        _where(draft),
        report.folded("Sessions and launches", report.what_was_run(results)),
        f"### Serving\n\n{_deeper(report.serving(results, plots))}",
        f"### Weight updates\n\n{_deeper(report.updates(results, plots))}",
        f"### Kernels\n\n{_deeper(report.kernels(results, plots))}",
    ]
    return "\n\n".join(parts).replace("](plots/", f"]({draft.plots_folder}/plots/")


def _deeper(text: str) -> str:
    return re.sub(r"(?m)^### ", "#### ", text)


def _where(draft: Draft) -> str:
    """What was measured, on what, and what was checked on other machines."""
    plan = draft.results.plan
    verb = "Rehearsed" if plan.rehearsal else "Measured"
    state = " with uncommitted changes" if plan.revision.dirty else ""
    names = report.interrupted(draft.results)
    kept = f"; interrupted and not counted: {', '.join(names)}" if names else ""
    what = (
        f"{verb}: sglang {draft.version}, built from the release and this "
        f"change (revision {plan.revision.git}{state}, digest of its files "
        f"{plan.revision.wheel}), model `{plan.model}`, TP {plan.tp}, "
        f"{plan.repeats} launches of each server, their order rotated{kept}. "
        f"The branch starts from {draft.base}{_drift(draft)}"
    )
    machines = dict.fromkeys(map(_machine, draft.results.environments))
    elsewhere = f"Checked elsewhere:\n{flow(draft.words['elsewhere'])}"
    return "\n".join([what, *(f"- {m}" for m in machines), "", elsewhere])


def _drift(draft: Draft) -> str:
    if not draft.differ:
        return ", where the files of this change are the ones measured."
    files = ", ".join(f"`{path}`" for path in draft.differ)
    return (
        ", NOT the code measured: other work there has changed these files of this "
        f"change: {files}."
    )


def _machine(environment: Environment) -> str:
    if environment.gpu:
        gpu = environment.gpu[0]
        device = f"{len(environment.gpu)} x {gpu.name}, driver {gpu.driver}"
    else:
        device = f"no GPU; {environment.cpu}, {environment.cores} cores"
    versions = (f"{name} {v}" for name, v in environment.versions.items())
    cuda = f", CUDA {environment.cuda}" if environment.cuda else ""
    return f"{device}{cuda}; Python {environment.python}, {', '.join(versions)}"


def _checklist(draft: Draft) -> str:
    """The template's items, or ours; ticked where this knows that they are done."""
    items = re.findall(r"(?m)^- \[ \] (.+)$", draft.template) or ITEMS
    notes = list(_notes(draft))
    lines = []
    for item in items:
        found = [n for n in notes if re.search(n[0], item, re.IGNORECASE)]
        mark, note = (found[0][1], f" ({found[0][2]})") if found else (" ", "")
        lines.append(f"- [{mark}] {item}{note}")
    return "\n".join(lines)


def _notes(draft: Draft) -> Iterator[tuple[str, str, str]]:
    """What is known of an item: a pattern for its text, its mark, and a note."""
    paths = draft.series.paths
    others = ", ".join(dict.fromkeys(draft.checks.others))
    passed = "passed: " + ", ".join(hook.label for hook in draft.checks.hooks)
    if others:
        yield r"\bpre-commit\b", " ", f"{passed}; not run: {others}"
    else:
        yield r"\bpre-commit\b", "x", passed
    if any(path.startswith("test/") for path in paths):
        yield r"\bunit tests?\b", "x", "in `test/registered`"
    if any(path.startswith("docs/") for path in paths):
        yield r"\bdocumentation", "x", "in `docs`"
    if draft.results.plan.gsm8k and not draft.results.plan.rehearsal:
        yield r"\baccuracy\b", "x", "above"
