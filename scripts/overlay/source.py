"""A Python text as lines and statements: where they stand, and what is found by its head.

Lines count from 0, and ranges are half open. The head of a statement is free of layout,
and spelled as `ast.unparse` spells it:

    x = ..., self.x: T = ...      its target                 "self.x ="
    if a: ... / elif a: ...       its test                   "if a"
    f("name", ...)                callee and first literal   "f('name')"
    anything else                 its text; of a block, its first line
    what is behind an `else`      that of its `if`           "else of if a"
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cached_property

from overlay.release import ReleaseError


class Unplaced(ReleaseError):
    """An edit that has no one place in upstream's source; says what was looked for."""


class Absent(Unplaced):
    """What an edit looks for is not in upstream's source."""


class Source:
    """A text that parses; SyntaxError if it does not."""

    def __init__(self, text: str):
        self.text = text if text.endswith("\n") or not text else text + "\n"
        self.lines = list(io.StringIO(self.text))
        self.body = ast.parse(text).body

    def span(self, node: ast.stmt) -> tuple[int, int]:
        """The lines of a statement, with its decorators."""
        tops = [node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]
        return min(tops) - 1, node.end_lineno

    def above(self, node: ast.stmt) -> int:
        """The first of the comment lines right above a statement, or its first line."""
        line = self.span(node)[0]
        while line and self.lines[line - 1].lstrip().startswith("#"):
            line -= 1
        return line

    def taken(self, node: ast.stmt, column: int) -> str:
        """A statement and the comments above it, moved to another column; what strings
        hold stays where it is."""
        lines, by = [], column - node.col_offset
        for at in range(self.above(node), self.span(node)[1]):
            line = self.lines[at]
            if at not in self._inside_strings and line.strip():
                line = " " * by + line if by > 0 else line[-by:]
            lines.append(line)
        return "".join(lines)

    def put(self, first: int, last: int, new: str) -> str:
        """The text with `new` in the place of these lines."""
        return "".join(self.lines[:first]) + new + "".join(self.lines[last:])

    @cached_property
    def _inside_strings(self) -> set[int]:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return {at for t in tokens for at in range(t.start[0], t.end[0])}


def head(node: ast.AST) -> str:
    match node:
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            return f"{ast.unparse(target)} ="
        case ast.If(test=test):
            return f"if {ast.unparse(test)}"
        case ast.Expr(value=ast.Call(func=f, args=[ast.Constant(value=first), *_])):
            return f"{ast.unparse(f)}({first!r})"
        case ast.Expr(value=ast.Call(func=f)):
            return f"{ast.unparse(f)}()"
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return f"def {name}"
    return ast.unparse(node).strip().split(":\n")[0]


def find(function: ast.stmt, wanted: str, within: str) -> ast.stmt:
    """The one statement below `function` with this head, inside a block with the head
    `within`, if that is not empty."""
    nodes = [n for n in ast.walk(function) if isinstance(n, ast.stmt) and n != function]
    at = {line for block in _blocks(function, within) for line in block}
    found = [n for n in nodes if head(n) == wanted and (not within or n.lineno in at)]
    where = f" within `{within}`" if within else ""
    if not found:
        raise Absent(f"has no `{wanted}`{where}")
    if len(found) > 1:
        raise Unplaced(f"has {len(found)} `{wanted}`{where}; say which by `within`")
    return found[0]


def _blocks(function: ast.stmt, wanted: str) -> Iterator[range]:
    """The lines, from 1, of the blocks with this head."""
    for node in ast.walk(function):
        for field, prefix in (("body", ""), ("orelse", "else of ")):
            block = getattr(node, field, None)
            if block and isinstance(block, list) and prefix + head(node) == wanted:
                yield range(block[0].lineno, block[-1].end_lineno + 1)


def leaves(node: ast.AST) -> list[ast.stmt]:
    """The statements of a scope: itself, or those in an `if` or `try`."""
    if not isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
        return [node]
    fields = ("body", "handlers", "orelse", "finalbody")
    children = (child for field in fields for child in getattr(node, field, ()))
    return [leaf for child in children for leaf in leaves(child)]


def dumps(nodes: list[ast.AST]) -> list[str]:
    return [ast.dump(node) for node in nodes]


def is_docstring(node: ast.stmt) -> bool:
    value = getattr(getattr(node, "value", None), "value", None)
    return isinstance(node, ast.Expr) and isinstance(value, str)


def without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    return body[1:] if body and is_docstring(body[0]) else body
