"""Merges an overlay's module-level imports into upstream's, and tidies the result.

Each, of one name (`from a import b as c`), goes behind those that open the file; the tools
of upstream's hooks do the rest. `from __future__` would change upstream's annotations.
"""

import ast
import re
import subprocess
import sys
from functools import cache

import black
import isort
from overlay.source import Source, Unplaced, is_docstring, leaves

_CHECK = "check --select=F401,F821 --fix --output-format=concise"
_ISORT = isort.Config(profile="black", known_first_party=frozenset({"sglang"}))
_PLAIN = (ast.Import, ast.ImportFrom)
_IGNORED = re.compile(r"from (__future__|overlay\.marks) ")


def of(node: ast.stmt) -> list[str]:
    """The imports of a statement, also of those inside an `if` or `try`."""
    found = []
    for leaf in leaves(node):
        if isinstance(leaf, ast.ImportFrom):
            start = f"from {'.' * leaf.level}{leaf.module or ''} import"
            found += [f"{start} {ast.unparse(alias)}" for alias in leaf.names]
        elif isinstance(leaf, ast.Import):
            found += [f"import {ast.unparse(alias)}" for alias in leaf.names]
    return found


def merge(text: Source, overlay: Source) -> str:
    """The text with the overlay's imports, but for those under an `if`, which are for
    editors. Raises Unplaced where upstream imports another thing by the same name."""
    plain = [node for node in overlay.body if isinstance(node, _PLAIN)]
    ours = [line for node in plain for line in of(node) if not _IGNORED.match(line)]
    binds = lambda line: line.split()[-1].split(".")[0]
    theirs = {binds(line): line for node in text.body for line in of(node)}
    for new in ours:
        other = theirs.get(binds(new), "")
        if new != other and other.startswith("from"):
            raise Unplaced(f"has `{other}`, the overlay `{new}`")
    have = {line for node in text.body if isinstance(node, _PLAIN) for line in of(node)}
    new = "".join(f"{line}\n" for line in ours if line not in have)
    place = 0
    for node in text.body:
        if not isinstance(node, _PLAIN) and not is_docstring(node):
            break
        place = text.span(node)[1]
    return text.put(place, place, new)


def tidy(upstream: str, merged: str) -> str:
    """The merged text in upstream's lint format, as far as upstream's text is."""
    is_black = _black(upstream) == upstream
    for formatted in (
        lambda text: _ruff(_CHECK, text).stdout,  # removes unused imports
        lambda text: isort.code(text, config=_ISORT),
        _black if is_black else lambda text: _ruff("format", text).stdout,
    ):
        tidied = formatted(merged)
        if tidied != merged and formatted(upstream) == upstream:
            merged = tidied
    return merged


def undefined(text: str) -> set[str]:
    """The names that a module reads and nothing defines."""
    return set(re.findall(r"F821.* Undefined name `(\w+)`", _ruff(_CHECK, text).stderr))


@cache
def _black(text: str) -> str:
    return black.format_str(text, mode=black.Mode())


@cache
def _ruff(command: str, text: str) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "ruff", *command.split(), "--isolated", "--quiet", "-"]
    return subprocess.run(run, input=text, capture_output=True, text=True)
