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
from dataclasses import dataclass, field

_SYMBOLS = re.compile(r"[A-Za-z_][\w.]*(, *[A-Za-z_][\w.]*)*")
_FIELD = re.compile(r"(why|thread|until): +(.+)")


@dataclass
class Entry:
    symbols: list[str]
    why: str
    thread: str = ""
    until: str = ""


@dataclass
class Ledger:
    prose: str = ""
    entries: list[Entry] = field(default_factory=list)

    @property
    def symbols(self) -> set[str]:
        return {symbol for entry in self.entries for symbol in entry.symbols}


def parse(overlay: str) -> Ledger:
    """The ledger of an overlay file; ValueError where an entry has no `why`."""
    ledger = Ledger()
    docstring = ast.get_docstring(ast.parse(overlay)) or ""
    prose = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        first, *rest = paragraph.splitlines() or [""]
        if rest and _SYMBOLS.fullmatch(first) and rest[0].startswith(" "):
            fields = _fields(rest)
            if "why" not in fields:
                raise ValueError(f"the ledger's entry for `{first}` has no `why:`")
            ledger.entries.append(Entry(re.split(", *", first), **fields))
        else:
            prose.append(paragraph)
    ledger.prose = "\n\n".join(prose).strip()
    return ledger


def _fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        if match := _FIELD.fullmatch(line.strip()):
            fields[match[1]] = match[2]
        elif fields:
            fields[list(fields)[-1]] += f" {line.strip()}"
    return fields
