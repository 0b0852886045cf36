"""Scripts that run themselves by the Python of `.venv`, whichever one they were started by;
that of another release, `.venv-VERSION`, goes on."""

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parents[1] / ".venv"


def run_in_venv() -> None:
    """Run this script again by `.venv`'s Python, unless that is what runs it.

    To be called before a script imports what only `.venv` has. Where there is no `.venv`,
    as on a machine with an environment of its own, a Python that has sglang goes on; another
    one exits with 2 and one line on stderr.
    """
    running = Path(sys.prefix).resolve()
    if running == VENV.resolve() or running.match(f"{VENV.parent}/.venv-*"):
        return
    python = VENV / "bin" / "python"
    if python.exists():
        os.execv(python, [str(python), *sys.argv])
    if importlib.util.find_spec("sglang") is None:
        print(f"{sys.argv[0]}: run ./scripts/setup.sh first", file=sys.stderr)
        sys.exit(2)
