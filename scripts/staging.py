"""Directories that appear complete or not at all."""

import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield a new empty directory that becomes `target` when the block ends well.

    An existing `target` is replaced, at the end. When the block raises, or the process
    is interrupted or terminated, `target` is as it was and the new directory is gone;
    only a killed process leaves it behind, hidden, as `.NAME.partial-*` beside target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        with _termination_as_exit():
            new, old = staging / "new", staging / "old"
            new.mkdir()
            yield new
            if target.exists():
                target.rename(old)
            new.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    previous = signal.signal(
        signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum)
    )
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
