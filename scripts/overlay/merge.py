"""Merges one overlay file into upstream's file of the same path, by name.

The rules, for the module and for each class that both sides have; merging twice gives the
same text:

- A definition (def, class, `NAME = ...`, `NAME: T = ...`) that upstream has, also inside
  an `if` or `try`, is replaced where it stands; of a class that both have each member.
- One that upstream lacks goes behind the definition before it in the overlay, or above
  the next one that upstream has, or to the end. An assignment in a class goes behind
  those that it has.
- The decorators of marks.py edit a function that upstream has (edits.py); imports are
  merged (imports.py), and names that stay undefined are errors.
"""

import ast
import re
import textwrap

from overlay import edits, imports, ledger
from overlay.source import (
    Absent,
    Source,
    Unplaced,
    head,
    leaves,
    without_docstring,
)

_MARKS = ("append", "decorate", "drop", "prepend", "splice")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_MAIN = "if __name__ == '__main__'"
# Nothing to merge; a test file of upstream's registers itself.
_NOTHING = re.compile(r"(\.\.\.|pass)$|register_\w+_ci\(")


def merge(upstream: str, overlay: str, release: str) -> "Merge":
    """Merges two source texts; `release` names `upstream` in errors. Raises Unplaced for a
    ledger, and SyntaxError for a text, that cannot be read."""
    entries = ledger.symbols(overlay)
    result = Merge(Source(upstream), Source(overlay), release)
    result.merge("", without_docstring(result.overlay.body))
    try:
        merged = imports.merge(result.source, result.overlay)
    except Unplaced as error:
        result.errors.append(f"{release}: {error}")
        return result
    for symbol in sorted(result.edited.keys() - entries):
        result.errors.append(f"the ledger has no entry for `{symbol}`")
    for symbol in sorted(entries - result.seen):
        result.errors.append(f"the ledger's `{symbol}` is not in the overlay")
    if merged != upstream:
        for name in sorted(imports.undefined(merged) - imports.undefined(upstream)):
            result.errors.append(f"{release} has no `{name}`, which the overlay uses")
    if not result.errors:
        result.text = imports.tidy(upstream, merged)
        result.edited = {} if result.text == upstream else result.edited
    return result


class Merge:
    """`text` is upstream's source with the overlay in it. It stands only without `errors`,
    and without `absent` (what there was not to drop) unless the tree holds it all already.
    `edited` holds upstream's text of every definition that an edit changes. Until the end,
    `source` is what the overlay's definitions go into, one after another."""

    def __init__(self, upstream: Source, overlay: Source, release: str):
        self.source, self.upstream, self.overlay = upstream, upstream, overlay
        self.text, self.release = upstream.text, release
        self.errors: list[str] = []
        self.absent: list[str] = []
        self.edited: dict[str, str] = {}
        self.seen: set[str] = set()  # all symbols of the overlay

    def merge(self, scope: str, overlay: list[ast.stmt]) -> None:
        overlay = [s for s in overlay if not _NOTHING.match(ast.unparse(s))]
        overlay = [s for s in overlay if not imports.of(s)]
        # Drops first: heads are of upstream's statements, not of what a splice adds.
        for statement in sorted(overlay, key=lambda each: _mark(each) != "drop"):
            symbol, mark = f"{scope}{_name(statement)}", _mark(statement)
            at = overlay.index(statement)
            try:
                self._put(statement, symbol, overlay[:at][::-1], overlay[at + 1 :])
            except (Unplaced, SyntaxError) as error:
                is_gone = mark == "drop" and isinstance(error, Absent)
                problems = self.absent if is_gone else self.errors
                problems.append(f"{self.release}: `{symbol}` {error}")

    def _body(self, symbol: str, text: Source | None = None) -> list[ast.stmt]:
        """The statements of the scope that a symbol is in."""
        scope = symbol.rpartition(".")[0]
        return self._find(scope, text)[0].body if scope else (text or self.source).body

    def _find(self, symbol: str, text: Source | None = None) -> list[ast.stmt]:
        """The definitions of a symbol."""
        nodes = [leaf for top in self._body(symbol, text) for leaf in leaves(top)]
        return [node for node in nodes if _name(node) == symbol.rpartition(".")[2]]

    def _put(self, statement, symbol: str, before: list, after: list) -> None:
        mark, found = _mark(statement), self._find(symbol)
        if _name(statement) is None:
            line = ast.unparse(statement).splitlines()[0]
            raise Unplaced(f"`{line}` is not a definition")
        if not mark and symbol in self.seen:
            raise Unplaced("is in the overlay twice")
        self.seen.add(symbol)
        if not found and mark:
            raise Absent(f"is not there to {mark}")
        if len(found) > 1:
            raise Unplaced(f"is defined {len(found)} times")
        if not found:
            self._add(statement, symbol, before, after)
        elif not mark and {type(statement), type(found[0])} == {ast.ClassDef}:
            self.merge(f"{symbol}.", without_docstring(statement.body))
        else:
            self._edit(found[0], statement, symbol, mark)

    def _edit(self, old, edit, symbol: str, mark: str | None) -> None:
        functions = isinstance(old, _FUNCTIONS) and isinstance(edit, _FUNCTIONS)
        if mark not in (None, "drop") and not functions:
            raise Unplaced(f"is not a function to {mark}")
        changed = getattr(edits, mark or "replace")(
            self.source, old, self.overlay, edit
        )
        if changed == self.source.text:
            return
        self.source = Source(changed)
        [was] = self._find(symbol, self.upstream)
        first, last = self.upstream.span(was)
        lines = "".join(self.upstream.lines[first:last])
        self.edited[symbol] = textwrap.dedent(lines)

    def _add(self, statement, symbol: str, before: list, after: list) -> None:
        body, simple = self._body(symbol), not hasattr(statement, "body")
        opening = [each for each in body if not hasattr(each, "body")]
        blank = "" if simple else "\n" if "." in symbol else "\n\n"
        place = self._place(body, before, after)
        if "." in symbol and simple:
            place = self.source.span((opening or body)[-1])[1]
        lines = self.overlay.taken(statement, body[0].col_offset if body else 0)
        self.source = Source(self.source.put(place, place, f"{blank}{lines}{blank}"))

    def _place(self, body: list[ast.stmt], before: list, after: list) -> int:
        """The line for a new definition, by its neighbours in the overlay."""
        holders = {_name(leaf): top for top in body for leaf in leaves(top)}
        behind = [holders[_name(s)] for s in before if _name(s) in holders]
        above = [holders[_name(s)] for s in after if _name(s) in holders]
        if body and head(body[-1]) == _MAIN:
            above.append(body[-1])
        if above and not behind:
            return self.source.above(above[0])
        return self.source.span((behind or body[::-1])[0])[1] if body else 0


def _name(node: ast.stmt) -> str | None:
    """The name that a statement defines, if it is a definition."""
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        return node.name
    targets = []
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = getattr(node, "targets", None) or [node.target]
    return getattr(targets[0], "id", None) if len(targets) == 1 else None


def _mark(statement: ast.stmt) -> str | None:
    """The edit that an overlay's statement asks for by a decorator of marks.py."""
    for decorator in getattr(statement, "decorator_list", ()):
        callee = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(callee, ast.Name) and callee.id in _MARKS:
            return callee.id
    return None
