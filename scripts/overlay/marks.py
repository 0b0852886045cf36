"""The overlay's decorators, for editors and linters; the tool reads them from the source.
edits.py says what each does; `within` is the head (source.py) of a block around a statement.
"""


def _mark(target=None, *, within=()):
    return target if target is not None else lambda decorated: decorated


append = decorate = drop = prepend = splice = _mark
