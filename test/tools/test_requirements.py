"""requirements/lock.txt holds what upstream.toml and the other files ask for."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins(file: str) -> dict:
    found = re.findall(
        r"(?m)^([\w.-]+)==([^\s;]+)", (ROOT / "requirements" / file).read_text()
    )
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_flashinfer_is_the_one_that_the_wheel_asks_for():
    with open(ROOT / "upstream.toml", "rb") as file:
        requires = tomllib.load(file)["requires"]
    wanted = {name.replace("_", "-"): version for name, version in requires.items()}
    assert wanted.items() <= pins("lock.txt").items()
    assert wanted == pins("overrides.txt")


def test_tools_and_release_are_the_same_everywhere():
    with open(ROOT / "upstream.toml", "rb") as file:
        release = tomllib.load(file)["release"]["version"]
    assert pins("serve.in")["sglang"] == release
    assert pins("tools.txt").items() <= pins("lock.txt").items()
    assert "sglang" not in pins("lock.txt")
