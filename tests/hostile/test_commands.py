"""Every case through every command: the exit code, one line that names what is to blame, and nothing touched."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.corpus import CASES, COMMANDS
from tests.hostile.runner import Ran, Runner, objections, tree_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and measures are those of Linux")

ALIKE = 6
OPTIONS = {
    "analyze": ["--no-structure", "--format", "svd", "--keep", "0.5"],
    "compress": ["--format", "svd", "--keep", "0.5", "-o"],
    "decompress": ["-o"],
}


@dataclass(frozen=True)
class Answer:
    """What a command did, and what it left behind beside its output."""

    ran: Ran
    left: list[str]


@pytest.fixture(scope="module")
def runners():
    """One for each core that they may well have: their commands run side by side, if no other tests do."""
    runners = [Runner() for _ in range(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)]
    yield runners
    for runner in runners:
        runner.close()


@pytest.fixture(scope="module")
def answers(runners, tmp_path_factory):
    """Return the name of a case's file, what all commands did with it, and what of it they changed."""
    found = {}

    def ask(name):
        if name not in found:
            found.clear()
            root = tmp_path_factory.mktemp("case")
            (root / "in").mkdir()
            model = CASES[name].build(root / "in")
            before = tree_of(root)
            logs = {command: tmp_path_factory.mktemp("log") for command in COMMANDS}
            share = [COMMANDS[:3], COMMANDS[3:]] if len(runners) > 1 else [COMMANDS]
            with ThreadPoolExecutor(len(runners)) as pool:
                parts = pool.map(
                    lambda runner, own: {command: answer_of(runner, command, model, logs[command]) for command in own},
                    runners,
                    share,
                )
                answered = {command: answer for part in parts for command, answer in part.items()}
            after = tree_of(root)
            changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
            found[name] = model.name, answered, changed
            for folder in (root, *logs.values()):
                shutil.rmtree(folder)
        return found[name]

    return ask


def answer_of(runner: Runner, command: str, model: Path, log: Path) -> Answer:
    work, home, scratch = (log / name for name in ("work", "home", "scratch"))
    for folder in (work, home, scratch):
        folder.mkdir()
    arguments = [command, str(model), *OPTIONS.get(command, [])]
    output = ("out" if model.is_dir() else "out.safetensors") if arguments[-1] == "-o" else None
    ran = runner.run([*arguments, *filter(None, [output])], work=work, home=home, scratch=scratch, log=log)
    left = sorted(str(path.relative_to(log)) for folder in (work, home, scratch) for path in folder.iterdir())
    return Answer(ran, [path for path in left if ran.code != 0 or path != f"work/{output}"])


def chosen():
    """Yield all cases; of those whose names begin alike only some run each time, the others with -m slow."""
    seen = Counter()
    for name in CASES:
        kind = name.split()[0]
        seen[kind] += 1
        yield pytest.param(name, marks=[pytest.mark.slow] if seen[kind] > ALIKE else [])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", list(chosen()))
def test_a_command_answers_as_it_should(name, command, answers):
    file, answered, changed = answers(name)
    answer = answered[command]
    ran = answer.ran
    said = f"exit code {ran.code} in {ran.seconds:.1f} s\n{ran.out[-3000:]}\n{ran.err[:3000]}"
    assert not objections(ran), f"{objections(ran)}\n{said}"
    assert not answer.left, said
    assert not changed, said
    code, words = CASES[name].expected[command]
    assert ran.code == code, said
    if code:
        assert printed(file) in ran.err or (code == 7 and "error: out" in ran.err)
        # What verify finds stands in its report, whose lines fold; its error only counts.
        lines = ran.err if code != 8 else ran.out + ran.err
        text = "".join(lines.split())
        for word in words:
            assert "".join(word.split()) in text, f"does not say {word!r}: {said}"


def printed(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name).replace("##", r"#\x23")
