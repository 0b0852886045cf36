"""The overlay's decorators. Overlay files import them for editors and linters; the tool
reads them from the source, and nothing here ever runs in a merged tree.

- `@prepend`, `@append`: the body goes to the start (after the docstring) or the end of
  upstream's function.
- `@splice`: each statement of the body takes the place of upstream's one statement with
  the same head.
- `@drop`: removes the function or class; with statements in its body, removes upstream's
  statements with these heads instead.
- `@decorate`: the other decorators of the def are added to upstream's function.

`@splice(within=...)` and `@drop(within=...)` name the heads of blocks around the
statement, where its own head is ambiguous; source.py says what a head is.
"""


def _mark(target=None, *, within=()):
    return target if target is not None else lambda decorated: decorated


append = decorate = drop = prepend = splice = _mark
