"""Edits inside one function, found by statement heads and never by line number.

The head of a statement is what it is recognized by, free of layout:

    x = ..., self.x: T = ...      its target                 "self.x ="
    if a: ... / elif a: ...       its test                   "if a"
    f("name", ...)                callee and first literal   "f('name')"
    anything else                 its text; of a block, its first line

A statement that `else` holds has "else" in its path of heads, one that an `except`
holds has that line: "except ValueError as error".
"""

import ast
from textwrap import dedent
from typing import Iterator

import libcst as cst

_BRANCHES = (cst.Else, cst.ExceptHandler, cst.Finally)


class Unplaced(Exception):
    """An edit that has no one place in upstream's source; says what was looked for."""


class Absent(Unplaced):
    """What an edit looks for is not in upstream's source."""


def source(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def canonical(node: cst.CSTNode) -> str:
    """The node's source without layout, comments and choice of quotes."""
    if isinstance(node, cst.BaseExpression):
        return ast.unparse(ast.parse(f"({source(node)})", mode="eval"))
    return ast.unparse(ast.parse(dedent(source(node))))


def head(statement: cst.BaseStatement) -> str:
    return _head(ast.parse(dedent(source(statement))).body[0])


def _head(node: ast.stmt) -> str:
    match node:
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            return f"{ast.unparse(target)} ="
        case ast.If(test=test):
            return f"if {ast.unparse(test)}"
        case ast.Expr(
            value=ast.Call(func=callee, args=[ast.Constant(value=first), *_])
        ):
            return f"{ast.unparse(callee)}({first!r})"
        case ast.Expr(value=ast.Call(func=callee)):
            return f"{ast.unparse(callee)}()"
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return f"def {name}"
    return ast.unparse(node).split(":\n")[0]


def parse_head(text: str) -> str:
    """The head that `text` spells: "else", "elif x", "for x in y", "self.x =", ..."""
    if text == "else" or text.startswith("except"):
        return text.rstrip(": ")
    text = text.removeprefix("el") if text.startswith("elif ") else text
    text = text.rstrip(": ")
    for completed in (
        text,
        f"{text}: ...",
        f"{text} ...",
        f"{text}: ...\nfinally: ...",
    ):
        try:
            return _head(ast.parse(completed).body[0])
        except SyntaxError:
            pass
    raise Unplaced(f"`within={text!r}` is not the head of a statement")


def statements(block: cst.BaseSuite) -> list[cst.BaseStatement]:
    if isinstance(block, cst.SimpleStatementSuite):
        return [cst.SimpleStatementLine(block.body)]
    return list(block.body)


def is_ellipsis(block: cst.BaseSuite) -> bool:
    return [canonical(statement) for statement in statements(block)] == ["..."]


def without_docstring(body: list[cst.BaseStatement]) -> list[cst.BaseStatement]:
    return body[1:] if body and is_docstring(body[0]) else body


def is_docstring(statement: cst.BaseStatement) -> bool:
    match statement:
        case cst.SimpleStatementLine(body=[cst.Expr(value=value)]):
            return isinstance(value, (cst.SimpleString, cst.ConcatenatedString))
    return False


def leaves(node: cst.CSTNode) -> Iterator[cst.BaseStatement]:
    """The statements of a scope below a node: itself, or those in an `if` or `try`."""
    if isinstance(node, (cst.IndentedBlock, cst.If, cst.Try, *_BRANCHES)):
        for child in node.children:
            yield from leaves(child)
    elif isinstance(node, (cst.SimpleStatementLine, cst.BaseCompoundStatement)):
        yield node


def in_place_of(upstream, overlay):
    """The overlay's node with the blank lines above upstream's, and with upstream's
    comments above unless it brings its own."""
    own = [line for line in overlay.leading_lines if line.comment]
    theirs = list(upstream.leading_lines)
    if own:
        blank = [i for i, line in enumerate(theirs) if line.comment] or [len(theirs)]
        first = next(i for i, line in enumerate(overlay.leading_lines) if line.comment)
        theirs = theirs[: blank[0]] + list(overlay.leading_lines[first:])
    return overlay.with_changes(leading_lines=theirs)


def prepend(function: cst.FunctionDef, added: cst.FunctionDef) -> cst.FunctionDef:
    body, new = statements(function.body), without_docstring(statements(added.body))
    start = len(body) - len(without_docstring(body))
    if _same(body[start : start + len(new)], new):
        return function
    return with_body(function, body[:start] + new + body[start:])


def append(function: cst.FunctionDef, added: cst.FunctionDef) -> cst.FunctionDef:
    body, new = statements(function.body), without_docstring(statements(added.body))
    if _same(body[-len(new) :], new):
        return function
    last = body[-1].body[0] if isinstance(body[-1], cst.SimpleStatementLine) else None
    if isinstance(last, (cst.Return, cst.Raise)):
        raise Unplaced("ends in `return` or `raise`; nothing can be appended to it")
    return with_body(function, body + new)


def decorate(function: cst.FunctionDef, edit: cst.FunctionDef) -> cst.FunctionDef:
    """The first decorator of the edit is the mark itself."""
    present = {canonical(d.decorator) for d in function.decorators}
    new = [d for d in edit.decorators[1:] if canonical(d.decorator) not in present]
    return function.with_changes(decorators=[*new, *function.decorators])


def splice(function, edit: cst.FunctionDef, within: tuple[str, ...]):
    """Of an `if` or `elif` that branch is replaced; the rest of the chain stays, unless
    the edit has `elif` or `else` of its own. A call with `...` among its arguments
    replaces upstream's arguments of the same keywords; the others stay."""
    for new in without_docstring(statements(edit.body)):
        old = _find(function, head(new), within)
        put = in_place_of(old, _with_arguments_of(old, new))
        if isinstance(put, cst.If) and put.orelse is None:
            put = put.with_changes(orelse=old.orelse)
        function = function.deep_replace(old, put)
    return function


def _with_arguments_of(old, new):
    match new:
        case cst.SimpleStatementLine(
            body=[cst.Expr(value=cst.Call(args=args) as call)]
        ):
            if any(isinstance(a.value, cst.Ellipsis) for a in args):
                own = {a.keyword.value: a.value for a in args if a.keyword}
                merged = [
                    (
                        a.with_changes(value=own[a.keyword.value])
                        if a.keyword and a.keyword.value in own
                        else a
                    )
                    for a in old.body[0].value.args
                ]
                whole = old.body[0].value.with_changes(args=merged)
                return new.deep_replace(call, whole)
    return new


def drop(function, edit: cst.FunctionDef, within: tuple[str, ...]):
    for gone in without_docstring(statements(edit.body)):
        function = _drop_statement(function, _find(function, head(gone), within))
    return function


def _drop_statement(function, gone: cst.BaseStatement):
    rest = getattr(gone, "orelse", None) if isinstance(gone, cst.If) else None
    if rest is None:
        return function.deep_remove(gone)
    if any(getattr(node, "orelse", None) is gone for node, _ in _walk(function)):
        return function.deep_replace(gone, rest)  # an elif: the chain closes over it
    blank = [line for line in gone.leading_lines if not line.comment]
    first = rest if isinstance(rest, cst.If) else rest.body.body[0]
    lines = blank + [line for line in first.leading_lines if line.comment]
    if isinstance(rest, cst.If):
        return function.deep_replace(gone, rest.with_changes(leading_lines=lines))
    body = [first.with_changes(leading_lines=lines), *rest.body.body[1:]]
    return function.deep_replace(gone, cst.FlattenSentinel(body))


def _find(function, wanted: str, within: tuple[str, ...]) -> cst.BaseStatement:
    path = [parse_head(text) for text in within]
    found = [
        node
        for node, blocks in _walk(function)
        if head(node) == wanted and _is_path(path, blocks)
    ]
    where = "".join(f" within `{text}`" for text in within)
    if not found:
        raise Absent(f"`{wanted}`{where}")
    if len(found) > 1:
        raise Unplaced(f"has {len(found)} of `{wanted}`{where}; say which by `within`")
    return found[0]


def _is_path(path: list[str], blocks: tuple[cst.CSTNode, ...]) -> bool:
    heads = iter(_block_head(block) for block in blocks)
    return all(wanted in heads for wanted in path)


def _block_head(block: cst.CSTNode) -> str:
    if isinstance(block, cst.Else):
        return "else"
    if isinstance(block, cst.ExceptHandler):
        return source(block.with_changes(leading_lines=())).split(":")[0].strip()
    return head(block)


def _walk(node: cst.CSTNode, blocks=()) -> Iterator[tuple[cst.BaseStatement, tuple]]:
    """Every statement and elif branch below a node, each with the blocks around it."""
    for child in node.children:
        if isinstance(child, cst.If) and isinstance(node, cst.If):
            yield child, blocks[:-1]
            yield from _walk(child, (*blocks[:-1], child))
        elif isinstance(child, cst.Else) and isinstance(node, cst.If):
            yield from _walk(child, (*blocks[:-1], child))
        elif isinstance(child, (cst.SimpleStatementLine, cst.BaseCompoundStatement)):
            yield child, blocks
            yield from _walk(child, (*blocks, child))
        elif isinstance(child, cst.ExceptHandler):
            yield from _walk(child, (*blocks, child))
        elif isinstance(child, (cst.BaseSuite, *_BRANCHES)):
            yield from _walk(child, blocks)


def _same(old: list[cst.BaseStatement], new: list[cst.BaseStatement]) -> bool:
    return [canonical(s) for s in old] == [canonical(s) for s in new]


def with_body(function, body: list[cst.BaseStatement]):
    block = function.body
    if not isinstance(block, cst.IndentedBlock):
        block = cst.IndentedBlock([])
    return function.with_changes(body=block.with_changes(body=body))
