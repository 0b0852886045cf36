"""Merges one overlay file into upstream's file of the same path, by name.

`merge` knows text only: no files, no releases. The rules, for the module and for each
class that both sides have:

- A definition (def, class, `NAME = ...`, `NAME: T = ...`) that upstream has, also inside
  an `if` or `try`, is replaced where it stands, decorators included; of a class that both
  have each member. Comments above stay unless the overlay brings its own.
- One that upstream lacks goes behind the definition before it in the overlay, or above
  the next one that upstream has, or to the end, but not behind
  `if __name__ == "__main__"`; at module level always above what runs it on import. An
  assignment in a class goes behind those that it has.
- The decorators of marks.py edit a function that upstream has, `NAME += [...]` its list
  (edits.py); imports are merged (imports.py), and names that stay undefined are errors.

Every edit finds itself in its own result, so merging twice gives the same text.
"""

import ast
import re
import textwrap
from dataclasses import dataclass, field

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


@dataclass
class Merge:
    """`text` is upstream's source with the overlay in it. It stands only without `errors`,
    and without `absent` (what there was not to drop) unless no file of the overlay changes
    anything: then the tree holds it already. `edited` holds upstream's text of every definition that an edit changes;
    lists that only grow are not among them."""

    text: str
    errors: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    edited: dict[str, str] = field(default_factory=dict)


def merge(upstream: str, overlay: str, release: str) -> Merge:
    """Merges two source texts; `release` names `upstream` in errors."""
    result = Merge(upstream)
    try:
        entries = ledger.symbols(overlay)
        merging = _Merging(Source(upstream), Source(overlay), release, result)
        merging.merge("", without_docstring(merging.overlay.body))
        merging.lift()
        merged = imports.merge(merging.text, merging.overlay)
    except Unplaced as error:
        result.errors.append(f"{release} {error}")
        return result
    except ValueError as error:
        result.errors.append(str(error))
        return result
    for symbol in sorted(merging.touched - entries):
        result.errors.append(f"the ledger has no entry for `{symbol}`")
    for symbol in sorted(entries - merging.seen):
        result.errors.append(f"the ledger's `{symbol}` is not in the overlay")
    if merged != upstream:
        for name in sorted(imports.undefined(merged) - imports.undefined(upstream)):
            result.errors.append(f"{release} has no `{name}`, which the overlay uses")
    if not result.errors:
        result.text = imports.tidy(upstream, merged)
        result.edited = {} if result.text == upstream else result.edited
    return result


class _Merging:
    """Upstream's text while the overlay's definitions go into it, one after another."""

    def __init__(self, text: Source, overlay: Source, release: str, result: Merge):
        self.text, self.upstream, self.overlay = text, text, overlay
        self.release, self.result = release, result
        self.touched: set[str] = set()  # upstream's symbols that change
        self.seen: set[str] = set()  # all symbols of the overlay
        self.added: list[str] = []  # new names at module level

    def merge(self, scope: str, overlay: list[ast.stmt]) -> None:
        overlay = [s for s in overlay if not imports.of(s) and not _registers_tests(s)]
        symbols = [f"{scope}{_name(statement)}" for statement in overlay]
        # Drops first: heads are of upstream's statements, not of what a splice adds.
        for at in sorted(
            range(len(overlay)), key=lambda i: _mark(overlay[i]) != "drop"
        ):
            symbol, mark = symbols[at], _mark(overlay[at])
            try:
                self._put(
                    overlay[at], symbol, mark, symbols[:at][::-1], symbols[at + 1 :]
                )
            except (Unplaced, SyntaxError) as error:
                is_gone = mark == "drop" and isinstance(error, Absent)
                problems = self.result.absent if is_gone else self.result.errors
                problems.append(f"{self.release}: `{symbol}` {error}")

    def lift(self) -> None:
        """Moves each new name of the module above the first statement that reads it while
        the module is imported."""
        for name in reversed(self.added):
            body = self.text.body
            mine = next(s for s in body if name in map(_name, leaves(s)))
            user = next(s for s in body if s is mine or name in _runs(s))
            if user is not mine:
                lines, place = self.text.taken(mine, 0), self.text.above(user)
                first, last = self.text.above(mine), self.text.span(mine)[1]
                rest = Source(self.text.put(first, last, ""))
                self.text = Source(rest.put(place, place, f"{lines}\n\n"))

    def _body(self, symbol: str, text: Source | None = None) -> list[ast.stmt]:
        """The statements of the scope that a symbol is in."""
        scope = symbol.rpartition(".")[0]
        return self._find(scope, text)[0].body if scope else (text or self.text).body

    def _find(self, symbol: str, text: Source | None = None) -> list[ast.stmt]:
        """The definitions of a symbol."""
        nodes = [leaf for top in self._body(symbol, text) for leaf in leaves(top)]
        nodes = [node for node in nodes if not isinstance(node, ast.AugAssign)]
        return [node for node in nodes if _name(node) == symbol.rpartition(".")[2]]

    def _put(self, statement, symbol: str, mark: str | None, before, after) -> None:
        if _name(statement) is None:
            line = ast.unparse(statement).splitlines()[0]
            raise Unplaced(f"`{line}` is not a definition")
        self.seen.add(symbol)
        found = self._find(symbol)
        if not found and mark:
            raise Absent(f"is not there to {mark}")
        if len(found) > 1:
            raise Unplaced(f"is defined {len(found)} times")
        if not found:
            self._add(statement, symbol, before, after)
        elif not mark and {type(statement), type(found[0])} == {ast.ClassDef}:
            theirs, ours = (
                ", ".join(map(ast.unparse, node.bases))
                for node in (found[0], statement)
            )
            if ours and ours != theirs:
                raise Unplaced(
                    f"has the bases {theirs or 'none'}, in the overlay {ours}"
                )
            members = [
                m for m in statement.body if ast.unparse(m) not in ("...", "pass")
            ]
            self.merge(f"{symbol}.", members)
        else:
            self._edit(found[0], statement, symbol, mark)

    def _edit(
        self, old: ast.stmt, edit: ast.stmt, symbol: str, mark: str | None
    ) -> None:
        functions = isinstance(old, _FUNCTIONS) and isinstance(edit, _FUNCTIONS)
        if mark in _MARKS and mark != "drop" and not functions:
            raise Unplaced(f"is not a function to {mark}")
        changed = getattr(edits, mark or "replace")(self.text, old, self.overlay, edit)
        if changed == self.text.text:
            return
        self.text = Source(changed)
        self.touched.add(symbol)
        if mark != "extend":
            [was] = self._find(symbol, self.upstream)
            first, last = self.upstream.span(was)
            lines = "".join(self.upstream.lines[first:last])
            self.result.edited[symbol] = textwrap.dedent(lines)

    def _add(self, statement, symbol: str, before: list, after: list) -> None:
        body, simple = self._body(symbol), not hasattr(statement, "body")
        opening = [s for s in body if not hasattr(s, "body")]
        column = body[0].col_offset if body else 0
        blank = "" if simple else "\n\n"
        if "." not in symbol:
            self.added.append(symbol)
            place = self._place(body, before, after)
        elif simple:
            place = self.text.span((opening or body)[-1])[1]
        else:
            place, blank = self._place(body, before, after), "\n"
        lines = self.overlay.taken(statement, column)
        self.text = Source(self.text.put(place, place, f"{blank}{lines}{blank}"))

    def _place(self, body: list[ast.stmt], before: list, after: list) -> int:
        """The line for a new definition, by its neighbours in the overlay."""
        holders = {_name(leaf): top for top in body for leaf in leaves(top)}
        for symbol in before:
            if top := holders.get(symbol.rpartition(".")[2]):
                return self.text.span(top)[1]
        for symbol in after:
            if top := holders.get(symbol.rpartition(".")[2]):
                return self.text.above(top)
        if body and head(body[-1]) == _MAIN:
            return self.text.above(body[-1])
        return self.text.span(body[-1])[1] if body else 0


def _runs(node: ast.AST) -> set[str]:
    """The names that a statement reads when it runs: not those in a function's body."""
    if isinstance(node, ast.Name):
        return {node.id}
    inner = list(ast.iter_child_nodes(node))
    if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
        body = node.body if isinstance(node.body, list) else [node.body]
        inner = [each for each in inner if each not in body]
    return {name for each in inner for name in _runs(each)}


def _registers_tests(statement: ast.stmt) -> bool:
    """`register_cuda_ci(...)` of a test file: upstream's file has its own."""
    return re.match(r"register_\w+_ci\(", ast.unparse(statement)) is not None


def _name(node: ast.stmt) -> str | None:
    """The name that a statement defines, if it is a definition."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name
        case ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.AugAssign(target=ast.Name(id=name), op=ast.Add()):
            return name
    return None


def _mark(statement: ast.stmt) -> str | None:
    """The edit that an overlay's statement asks for by a decorator or by `+=`."""
    for decorator in getattr(statement, "decorator_list", ()):
        callee = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(callee, ast.Name) and callee.id in _MARKS:
            return callee.id
    return "extend" if isinstance(statement, ast.AugAssign) else None
