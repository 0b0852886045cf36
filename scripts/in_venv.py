"""Scripts that run themselves by the Python of `.venv`, whichever one they were started by."""

import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parents[1] / ".venv"


def run_in_venv() -> None:
    """Run this script again by `.venv`'s Python, unless that is what runs it.

    To be called before a script imports what only `.venv` has. Exits with 2 and one line
    on stderr where there is no `.venv`.
    """
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    python = VENV / "bin" / "python"
    if not python.exists():
        name = Path(sys.argv[0]).name
        print(f"{name}: run ./scripts/setup.sh first", file=sys.stderr)
        sys.exit(2)
    os.execv(python, [str(python), *sys.argv])
