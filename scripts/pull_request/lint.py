"""Upstream's own pre-commit checks that need no network, on some files of a tree.

Reads repositories and hooks as .pre-commit-config.yaml spells them. Of the hooks it
knows those that judge a file by its text; each runs at its pinned version, by uv.
"""

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

CONFIG = ".pre-commit-config.yaml"
PYTHON, TOML, YAML, TEXT = r"\.pyi?$", r"\.toml$", r"\.ya?ml$", ""
KNOWN = {  # hook: package, files it takes, command
    "black": ("black", PYTHON, ["black"]),
    "black-jupyter": ("black[jupyter]", PYTHON, ["black"]),
    "codespell": ("codespell", TEXT, ["codespell"]),
    "isort": ("isort", PYTHON, ["isort"]),
    "ruff": ("ruff", PYTHON, ["ruff", "check", "--force-exclude"]),
    "ruff-check": ("ruff", PYTHON, ["ruff", "check", "--force-exclude"]),
    "check-ast": ("pre-commit-hooks", PYTHON, ["check-ast"]),
    "check-toml": ("pre-commit-hooks", TOML, ["check-toml"]),
    "check-yaml": ("pre-commit-hooks", YAML, ["check-yaml"]),
    "debug-statements": ("pre-commit-hooks", PYTHON, ["debug-statement-hook"]),
    "detect-private-key": ("pre-commit-hooks", TEXT, ["detect-private-key"]),
    "end-of-file-fixer": ("pre-commit-hooks", TEXT, ["end-of-file-fixer"]),
    "trailing-whitespace": ("pre-commit-hooks", TEXT, ["trailing-whitespace-fixer"]),
}


class LintError(Exception):
    """A check that failed, with its output, or a configuration that cannot be read."""


@dataclass(frozen=True)
class Hook:
    """One check: the PyPI requirement it comes from, its command, the files it takes
    (regular expressions on a path, all of which must match) and leaves out."""

    id: str
    requirement: str
    command: tuple[str, ...]
    files: tuple[re.Pattern, ...]
    exclude: tuple[re.Pattern, ...]

    @property
    def label(self) -> str:
        return f"{self.id} ({self.requirement})"

    def takes(self, path: str) -> bool:
        return all(p.search(path) for p in self.files) and not any(
            p.search(path) for p in self.exclude
        )


@dataclass(frozen=True)
class Checks:
    """The hooks that can run here, and the ids of the others."""

    hooks: tuple[Hook, ...]
    others: tuple[str, ...]


def read_checks(text: str, where: str) -> Checks:
    """The checks of a .pre-commit-config.yaml. Raises LintError."""
    try:
        return make_checks(yaml.safe_load(text), where)
    except yaml.YAMLError as error:
        raise LintError(f"{where} is not YAML: {error}") from error


def make_checks(config: dict, where: str) -> Checks:
    """The checks of a configuration of .pre-commit-config.yaml's form."""
    try:
        pairs = [(repo, hook) for repo in config["repos"] for hook in repo["hooks"]]
        hooks = [_hook(config, r, h) for r, h in pairs if h["id"] in KNOWN]
        others = [h["id"] for _, h in pairs if h["id"] not in KNOWN]
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise LintError(
            f"{where} cannot be read as pre-commit does: {error!r}"
        ) from error
    if not hooks:
        raise LintError(f"{where} has none of the hooks {', '.join(sorted(KNOWN))}")
    return Checks(tuple(hooks), tuple(others))


def _hook(config: dict, repo: dict, hook: dict) -> Hook:
    package, kind, command = KNOWN[hook["id"]]
    return Hook(
        hook["id"],
        f"{package}=={repo['rev'].removeprefix('v')}",
        (*command, *hook.get("args", ())),
        (re.compile(kind), *_patterns("files", config, hook)),
        _patterns("exclude", config, hook),
    )


def _patterns(key: str, *places: dict) -> tuple[re.Pattern, ...]:
    return tuple(re.compile(place[key]) for place in places if key in place)


def run_checks(checks: Checks, tree: Path, paths: list[str]) -> None:
    """Run every hook on those of `paths` that it takes, in `tree`, which the hooks may
    change. Raises LintError with the output of all that fail."""
    uv, failures = find_uv(), []
    for hook in checks.hooks:
        if chosen := [path for path in paths if hook.takes(path)]:
            failures += [f"{hook.label}:\n{o}" for o in _run(uv, hook, tree, chosen)]
    if failures:
        raise LintError(
            "upstream's checks fail on the merged files:\n" + "\n".join(failures)
        )


def _run(uv: str, hook: Hook, tree: Path, paths: list[str]) -> Iterator[str]:
    """What a hook says if it fails or, as pre-commit has it, changes a file."""
    before = {path: (tree / path).read_text() for path in paths}
    run = [uv, "tool", "run", "--no-progress", "--no-python-downloads"]
    run += ["--python", sys.executable, "--from", hook.requirement, *hook.command]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*run, *paths],
        check=False,
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    diffs = [
        _diff(path, old, (tree / path).read_text()) for path, old in before.items()
    ]
    if done.returncode or any(diffs):
        yield done.stdout + done.stderr + "".join(diffs)


def _diff(path: str, old: str, new: str) -> str:
    lines = (text.splitlines(keepends=True) for text in (old, new))
    return "".join(difflib.unified_diff(*lines, path, f"{path}, as it should be"))


def find_uv() -> str:
    """The uv of scripts/env.sh, which installs it where there is none."""
    script = 'source "$1" && ensure_uv >&2 && echo "$UV"'
    environment = Path(__file__).parents[1] / "env.sh"
    done = subprocess.run(
        ["bash", "-c", script, "-", environment],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise LintError("uv, which fetches the linters, could not be installed")
    return done.stdout.strip()
