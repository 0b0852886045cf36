"""upstream.lock.toml: a hash of every upstream definition that the overlay edits.

A name alone hides drift: the definition that an edit replaces, splices into or adds to
must be the one that it was written for. The file has a table a release, and in it one a
file; `patchset lock` writes that of upstream.toml's release. Hashes are of the
definition's text without the comments above it.
"""

import difflib
import hashlib
import tomllib
from collections.abc import Callable
from pathlib import Path

from overlay.release import ReleaseError

NAME = "upstream.lock.toml"
Edited = dict[str, dict[str, str]]  # by file and symbol: upstream's text, or its hash


def hashes(edited: Edited) -> Edited:
    return {
        path: {s: hashlib.sha256(texts[s].encode()).hexdigest()[:16] for s in texts}
        for path, texts in sorted(edited.items())
        if texts
    }


def read(root: Path) -> dict[str, Edited]:
    """The recorded hashes, by release."""
    file = root / NAME
    return tomllib.loads(file.read_text()) if file.exists() else {}


def write(root: Path, release: str, edited: Edited) -> None:
    lines = ["# Written by `scripts/patchset lock`; see scripts/overlay/lock.py."]
    for version, files in (read(root) | {release: hashes(edited)}).items():
        for path, symbols in files.items():
            lines += ["", f'["{version}"."{path}"]']
            lines += [f'"{symbol}" = "{symbols[symbol]}"' for symbol in sorted(symbols)]
    (root / NAME).write_text("\n".join(lines) + "\n")


def drift(
    edited: Edited, recorded: Edited, release: str, base: Callable[[], Edited]
) -> list[str]:
    """An error for each definition that is not the recorded one, with what changed since
    `release`, whose definitions `base` fetches."""
    found = [
        (path, symbol, recorded.get(path, {}).get(symbol))
        for path, symbols in hashes(edited).items()
        for symbol in symbols
        if recorded.get(path, {}).get(symbol) != symbols[symbol]
    ]
    try:
        old = base() if found else {}
    except ReleaseError:
        old = {}  # it cannot be fetched: the names have to do
    errors = []
    for path, symbol, known in found:
        texts = old.get(path, {}).get(symbol, ""), edited[path][symbol]
        lines = (text.splitlines(keepends=True) for text in texts)
        diff = "".join(difflib.unified_diff(*lines, release, "this tree"))
        told = f"is not the one of {release} that the edit was written for\n{diff}"
        if not known:
            told = f"is new here: nothing is recorded of it in {release}"
        errors.append(f"{path}: `{symbol}` {told}".rstrip())
    return errors
