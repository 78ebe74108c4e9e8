"""The shipped checkpoint and its examples, as `unihema demo` lays them down, and the code of the page of plugs."""

import re
from pathlib import Path

import pytest

from unihema.shipped import copy_examples, lay_down_checkpoint


PAGE = Path(__file__).parents[2] / "docs" / "plugs.md"


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    lay_down_checkpoint(folder / "unihema", weights="open")
    copy_examples(folder / "smears")
    return folder


@pytest.fixture
def page(demo, monkeypatch):
    """Runs the code below a heading of the page in the demo's folder; gives its names."""

    def run(heading: str, **names) -> dict:
        monkeypatch.chdir(demo)
        (part,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
        exec(compile("\n".join(re.findall(r"^```py\n(.*?)^```", part, re.M | re.S)), heading, "exec"), names)
        return names

    return run
