"""upstream.lock.toml: a hash of every upstream definition that the overlay edits.

A name alone hides drift: a definition that is edited must be the one that the edit was
written for. By release and file; hashes are of the text without the comments above it.
"""

import difflib
import hashlib
import tomllib
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


def drift(edited: Edited, recorded: Edited, release: str, base) -> list[str]:
    """An error for each definition that is not the recorded one of `release` (`base`)."""
    now, errors, old = hashes(edited), [], {}
    was = {path: recorded.get(path, {}) for path in now}
    found = [(p, s) for p in now for s in now[p] if was[p].get(s) != now[p][s]]
    with suppress(ReleaseError):  # if it cannot be fetched, the names have to do
        old = base() if found else {}
    for path, symbol in found:
        texts = old.get(path, {}).get(symbol, ""), edited[path][symbol]
        lines = (text.splitlines(keepends=True) for text in texts)
        diff = "".join(difflib.unified_diff(*lines, release, "this tree"))
        told = f"is not the one of {release} that the edit was written for\n{diff}"
        if symbol not in was[path]:
            told = f"is new here: {NAME} has it not for {release}: patchset lock"
        errors.append(f"{path}: `{symbol}` {told}".rstrip())
    return errors
