"""What each mark does to one definition of upstream: the text afterwards. Each takes
upstream's source and definition, and the overlay's; all but `drop` find themselves in
their own result."""

import ast
import re

from overlay.source import Source, Unplaced, dumps, find, head, without_docstring


def replace(text: Source, old, overlay: Source, new) -> str:
    """Upstream's comments above stay, unless the overlay has its own."""
    first, last = text.span(old)
    if overlay.above(new) != overlay.span(new)[0]:
        first = text.above(old)
    return text.put(first, last, overlay.taken(new, old.col_offset))


def prepend(text: Source, old, overlay: Source, edit) -> str:
    """The edit's statements go to the start, behind the docstring."""
    rest = without_docstring(old.body)
    place = text.above(rest[0]) if rest == old.body else text.span(old.body[0])[1]
    return _insert(text, old, overlay, edit, place, rest[: len(edit.body)])


def append(text: Source, old, overlay: Source, edit) -> str:
    """The edit's statements go to the end."""
    place, there = text.span(old)[1], old.body[-len(without_docstring(edit.body)) :]
    changed = _insert(text, old, overlay, edit, place, there)
    if changed != text.text and isinstance(old.body[-1], (ast.Return, ast.Raise)):
        raise Unplaced("ends in `return` or `raise`; nothing can be appended to it")
    return changed


def _insert(text, old, overlay: Source, edit, place: int, there: list) -> str:
    new = without_docstring(edit.body)
    if dumps(there[: len(new)]) == dumps(new):
        return text.text
    lines = (overlay.taken(each, old.body[0].col_offset) for each in new)
    return text.put(place, place, "".join(lines))


def decorate(text: Source, old, overlay: Source, edit) -> str:
    """The other decorators of the edit are added."""
    present = {ast.unparse(d) for d in old.decorator_list}
    new = [ast.unparse(d) for d in edit.decorator_list[1:]]
    place, indent = text.span(old)[0], " " * old.col_offset
    lines = [f"{indent}@{d}\n" for d in new if d not in present]
    return text.put(place, place, "".join(lines))


def splice(text: Source, old, overlay: Source, edit) -> str:
    """Each statement takes the place of the one with its head, inside the block `within`. Of
    an `if` or `elif` the branch is replaced; the chain stays, unless the edit has its own.
    """
    for new in without_docstring(edit.body):
        was = find(old, head(new), _within(edit))
        first, last = text.span(was)
        if isinstance(new, ast.If) and not new.orelse:
            last = was.body[-1].end_lineno
        if overlay.above(new) != overlay.span(new)[0]:
            first = text.above(was)
        lines = overlay.taken(new, was.col_offset)
        if _is_elif(text, was):
            lines = re.sub(r"(?m)^( *)if\b", r"\1elif", lines, count=1)
        text, old = _again(text.put(first, last, lines), old)
    return text.text


def drop(text: Source, old, overlay: Source, edit) -> str:
    """Without upstream's definition, or without its statements of the edit's heads."""
    if ast.unparse(edit.body) == "...":
        return text.put(text.above(old), text.span(old)[1], "")
    for gone in without_docstring(edit.body):
        was = find(old, head(gone), _within(edit))
        last = text.span(was)[1]
        if getattr(was, "orelse", ()):
            last = was.body[-1].end_lineno
            if not _is_elif(text, was):
                raise Unplaced(f"has `else` behind `{head(was)}`: splice it")
        text, old = _again(text.put(text.above(was), last, ""), old)
    return text.text


def _is_elif(text: Source, node: ast.stmt) -> bool:
    return text.lines[node.lineno - 1].lstrip().startswith("elif")


def _within(edit) -> str:
    keywords = getattr(edit.decorator_list[0], "keywords", ())
    return "".join(ast.literal_eval(keyword.value) for keyword in keywords)


def _again(changed: str, old: ast.stmt) -> tuple[Source, ast.stmt]:
    """The changed text, and in it the definition that still starts on the same line."""
    text = Source(changed)
    nodes = (node for top in text.body for node in ast.walk(top))
    same = (n for n in nodes if type(n) is type(old) and n.lineno == old.lineno)
    return text, next(same)
