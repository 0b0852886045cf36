"""upstream.lock.toml: a hash of every upstream definition that the overlay edits.

A name alone hides drift: a definition that is edited must be the one that the edit was
written for. By release and file; hashes are of the text without the comments above it.
"""

import difflib
import hashlib
import tomllib
from collections.abc import Callable
from contextlib import suppress
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
    now, errors, old = hashes(edited), [], {}
    was = lambda path, symbol: recorded.get(path, {}).get(symbol)
    found = [(p, s) for p in now for s in now[p] if was(p, s) != now[p][s]]
    with suppress(ReleaseError):  # if it cannot be fetched, the names have to do
        old = base() if found else {}
    for path, symbol in found:
        texts = old.get(path, {}).get(symbol, ""), edited[path][symbol]
        lines = (text.splitlines(keepends=True) for text in texts)
        diff = "".join(difflib.unified_diff(*lines, release, "this tree"))
        told = f"is not the one of {release} that the edit was written for\n{diff}"
        if not was(path, symbol):
            told = f"is new here: nothing is recorded of it in {release}"
        errors.append(f"{path}: `{symbol}` {told}".rstrip())
    return errors
