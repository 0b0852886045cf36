"""The ledger that opens an overlay file: its docstring, one paragraph a symbol.

    Fp8LinearMethod.apply
        why: the backend is chosen by layer, not by server
        thread: sgl-project/sglang#12345
        until: upstream does the same

Several symbols with one reason share a paragraph: `a, B.c`. Paragraphs of another form
are prose about the file. A file without entries is one that upstream does not have.
"""

import ast
import re

from overlay.source import Unplaced

_ENTRY = re.compile(r"(?ms)^([A-Za-z_][\w.]*(?:, *[\w.]+)*)\n +(\S.*?)(?=\n\s*\n|\Z)")
_FIELD = re.compile(r"(why|thread|until): (.+?)(?= (?:why|thread|until): |$)")


def parse(overlay: str) -> dict[str, dict[str, str]]:
    """An overlay file's entries: the fields of each, by its symbols as they are written;
    Unplaced where one has no `why`."""
    entries = {}
    for symbols, text in _ENTRY.findall(docstring(overlay)):
        entries[symbols] = dict(_FIELD.findall(" ".join(text.split())))
        if "why" not in entries[symbols]:
            raise Unplaced(f"the ledger's entry for `{symbols}` has no `why:`")
    return entries


def symbols(overlay: str) -> set[str]:
    return {symbol for names in parse(overlay) for symbol in re.split(", *", names)}


def docstring(overlay: str) -> str:
    return ast.get_docstring(ast.parse(overlay)) or ""
