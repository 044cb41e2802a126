"""The README's commands, run as they stand there: what it shows is what comes out."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file
from typer.models import OptionInfo

from tcompress.cli.app import app
from tcompress.cli.options import DTypeName
from tcompress.errors import TcompressError
from tcompress.formats import FORMATS
from tcompress.workflow.plan import parse_plan
from tcompress.workflow.settings import STORED_TYPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def example_folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    return tmp_path


def shell(command: str, folder: Path) -> str:
    command = re.sub(r"^tcompress\b", f"{sys.executable} -m tcompress", command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, text=True, check=True, capture_output=True)
    return done.stdout


def agree(printed: str, shown: str) -> bool:
    """Compare word by word, but for the time a run took; errors may differ in the last digit between processors."""
    both = [re.sub(r"in \d+\.\d+ s", "in T s", text).split() for text in (printed, shown)]
    return len(both[0]) == len(both[1]) and all(map(alike, *both))


def alike(word: str, other: str) -> bool:
    if re.fullmatch(r"\d\.\d{4}", word) and re.fullmatch(r"\d\.\d{4}", other):
        return abs(float(word) - float(other)) < 1.5e-4
    return word == other


def test_the_five_minutes_print_what_the_readme_shows(example_folder):
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            assert agree(shell(command, example_folder), shown), command
    spec = importlib.util.spec_from_file_location("models", ROOT / "fixtures" / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    before = models.accuracy(load_file(example_folder / "fixtures" / "digits_mlp.safetensors"), "digits_mlp")
    after = models.accuracy(load_file(example_folder / "dense.safetensors"), "digits_mlp")
    assert f"right on {before:.1%} before and on {after:.1%} after".replace("%", " %") in README.replace("\n", " ")


def test_the_python_example_runs_after_the_main_install(example_folder):
    (example_folder / "sklearn.py").write_text("raise ModuleNotFoundError('scikit-learn is for the tests alone')\n")
    for program in blocks("python"):
        (example_folder / "example.py").write_text(program)
        assert shell(f"{sys.executable} example.py", example_folder) == "True True\n"


def test_the_plan_shown_is_a_plan():
    for document in blocks("json"):
        assert len(parse_plan(json.loads(document), "README").rules) == 4


def test_every_command_format_and_exit_code_is_documented():
    for command in app.registered_commands:
        assert (
            f"| `tcompress {command.callback.__name__} " in README
            or f"| `tcompress {command.callback.__name__}`" in README
        )
    for name in FORMATS:
        assert f"| `{name}` |" in README
        assert f"| `{name}` |" in (ROOT / "tcompress/checkpoint/FORMAT.md").read_text()
    codes = {TcompressError.exit_code, *(cls.exit_code for cls in TcompressError.__subclasses__())}
    for code in codes:
        assert f"| {code} |" in README


def test_every_stored_type_is_documented():
    assert f"`--dtype {'|'.join(STORED_TYPES)}` is the type" in README
    (help_text,) = {each.help for each in get_args(DTypeName) if isinstance(each, OptionInfo)}
    assert set(STORED_TYPES) <= set(re.findall(r"\w+", help_text))


def test_the_set_up_commands_are_there_for_ci():
    for name in ("main job", "tests"):
        assert re.search(rf"<!-- set-up: {name} -->\n```sh\npip install -c \.ci/constraints\.txt ", README)
