"""The overlay's decorators, for editors and linters: the tool reads them from the source,
and nothing here ever runs in a merged tree. edits.py says what each does; `within` names
the heads (source.py) of blocks around a statement whose own head is ambiguous.
"""


def _mark(target=None, *, within=()):
    return target if target is not None else lambda decorated: decorated


append = decorate = drop = prepend = splice = _mark
