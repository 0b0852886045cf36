"""Directories that appear complete or not at all."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield a new empty directory that becomes `target`, which must not exist, when the
    block ends well.

    When the block raises, or the process is interrupted or terminated, the new directory is
    gone; only a killed process leaves it, hidden, as `.NAME.partial-*` beside target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with TemporaryDirectory(prefix=prefix, dir=target.parent) as staging:
            new = Path(staging, "new")
            new.mkdir()
            yield new
            new.rename(target)
    finally:
        signal.signal(signal.SIGTERM, previous)
