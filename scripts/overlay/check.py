"""What `patchset check` runs on a merged tree: upstream's lint rules, and every import."""

import json
import os
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from overlay.imports import tidy, undefined
from overlay.plan import Change
from overlay.release import Tree

STAND_INS = Path(__file__).parents[1] / "cpu_stand_ins"
IMPORT = """
import importlib, json, sys
report, stand_ins, *names = sys.argv[1:]
try:
    import sgl_kernel
except ImportError:  # it needs a GPU's libraries
    sys.path.insert(0, stand_ins)
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = f"{type(error).__name__}: {error}"
json.dump(failed, open(report, "w"))
"""


def lint(changes: list[Change]) -> list[str]:
    """What ruff, isort and black find and did not find in upstream's own file."""
    found = []
    for change in changes:
        if change.path.endswith(".py"):
            old, new = (change.old or b"").decode(), change.new.decode()
            unknown = sorted(undefined(new) - undefined(old))
            found += [f"{change.path}: `{name}` is undefined" for name in unknown]
            if tidy(old, new) != new:
                found.append(f"{change.path}: ruff, isort or black would change it")
    return found


def imports(package: dict[str, bytes], tree: Tree, root: Path) -> tuple[list[str], str]:
    """Which of the merged modules cannot be imported, and what was done, or why it was
    not. A module that needs a package which is not here is only counted."""
    names = [path[7:-3].replace("/", ".") for path in package if path.endswith(".py")]
    if not (python := interpreter(root, tree.version)):
        return [], f"not imported: no .venv has the packages of {tree.label}"
    with TemporaryDirectory() as folder:
        tree.copy_package(Path(folder), package)
        environment = {"PYTHONPATH": f"{folder}/python", "SGLANG_USE_CPU_ENGINE": "1"}
        report = Path(folder, "failed.json")
        report.write_text('{"the import": "ends its process"}')
        command = [python, "-W", "ignore", "-c", IMPORT, report, STAND_INS, *names]
        subprocess.run(command, env=os.environ | environment, capture_output=True)
        failed = json.loads(report.read_text())
    outside = re.compile("ModuleNotFoundError: No module named '(?!sglang)")
    told = [f"{n}: {why}" for n, why in failed.items() if not outside.match(why)]
    return told, f"imported: {len(names) - len(failed)} of {len(names)} modules"


def interpreter(root: Path, version: str) -> Path | None:
    """Python of the environment that has this release: .venv, or .venv-VERSION."""
    folders = root / ".venv", root / f".venv-{version}"
    info = f"lib/python*/site-packages/sglang-{version}[.+]*dist-info"
    return next((f / "bin/python" for f in folders if any(f.glob(info))), None)
