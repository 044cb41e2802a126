"""What rounds of a run were and gave, in a folder in its output's workspace, until the whole is done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX
from tcompress.checkpoint.output import STATE, Output
from tcompress.training.history import Row
from tcompress.training.outcome import Round, Scored, Trained
from tcompress.training.starting import RESULT, ROUNDS
from tcompress.training.state import write_whole
from tcompress.workflow.results import measure


@dataclass(frozen=True)
class Done:
    """A round that is over."""

    round: Round
    trained: Trained


class RoundFiles:
    """The files of one run. run: what makes two runs the same, as JSON; those of another run are not taken."""

    def __init__(self, output: Output, run: Mapping[str, Any]) -> None:
        self.output = output
        name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = output.workspace / f"{ROUNDS}{name}"

    def begin(self) -> bool:
        """Make the folder, and take away what runs of another kind have left; return whether there was any."""
        others = [path for path in self.output.workspace.glob(f"{ROUNDS}*") if path != self.folder]
        if self.folder.is_symlink() or not self.folder.is_dir():
            _take_away(self.folder)
        for other in others:
            _take_away(other)
        self.folder.mkdir(exist_ok=True)
        for link in self.folder.iterdir():  # by which a stranger could choose what is read
            if link.is_symlink():
                link.unlink()
        return bool(others)

    def start(self, number: int) -> Path:
        """Return the checkpoint that a round starts from, there whole or not at all."""
        return self._checkpoint(f"start-{number}")

    def result(self, number: int) -> Path:
        """Return the checkpoint that a round ended with, there whole or not at all."""
        return self._checkpoint(f"{RESULT}-{number}")

    def finished(self) -> list[Done]:
        """Return the rounds that are over, the first being 1."""
        done: list[Done] = []
        while self.result(len(done) + 1).exists():
            document = json.loads(self._figures(len(done) + 1).read_text("utf-8"))
            done.append(Done(_round(document["round"]), _trained(document["trained"])))
        return done

    def put(self, done: Done) -> None:
        """Give the output's draft the name of a round's result, and take away what the round no longer needs."""
        number = done.round.number
        written = measure(self.output.draft, self.output.is_folder)
        done = replace(done, round=replace(done.round, nbytes=written.nbytes))
        document = json.dumps(asdict(done), default=str)
        write_whole(self._figures(number), lambda file: file.write(document.encode("utf-8")))
        # Before the result is there: a state that stayed would be taken for one of other settings by the next round.
        (self.output.workspace / STATE).unlink(missing_ok=True)
        self.output.draft.replace(self.result(number))
        _take_away(self.start(number))

    def hand_over(self, number: int) -> None:
        """Make a round's result the draft of the output."""
        _take_away(self.output.draft)
        self.result(number).replace(self.output.draft)

    def _figures(self, number: int) -> Path:
        return self.folder / f"{RESULT}-{number}.json"

    def _checkpoint(self, stem: str) -> Path:
        return self.folder / (stem if self.output.is_folder else f"{stem}{SAFETENSORS_SUFFIX}")


def _round(found: Mapping[str, Any]) -> Round:
    layers = {name: (was, became) for name, (was, became) in found["layers"].items()}
    return Round(**{**found, "layers": layers})


def _trained(found: Mapping[str, Any]) -> Trained:
    rows = tuple(Row(**row) for row in found["rows"])
    dense = Scored(**{**found["dense"], "path": Path(found["dense"]["path"])})
    return Trained(**{**found, "rows": rows, "dense": dense, "notes": tuple(found["notes"])})


def _take_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
