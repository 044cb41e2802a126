"""What a run has finished, written down as it goes, so that the same run can go on after it was stopped.

Two files in the run's workspace: ``spool`` holds the finished tensors, one behind the other; ``journal`` has a line of
JSON for the run itself, then one for each finished step: what it found, where its tensors lie, and their hashes. A line
counts only when its own hash and those of all its tensors are right: whatever a crash, a full disk or a power cut left
half-written is dropped with everything after it, and done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from xxhash import xxh3_128_hexdigest

from tcompress.checkpoint.dtypes import BY_CODE, BY_TORCH
from tcompress.checkpoint.mapped import bytes_of, map_bytes
from tcompress.checkpoint.writer import Piece

JOURNAL, SPOOL = "journal", "spool"


@dataclass(frozen=True)
class Record:
    """A finished step: what it found, as JSON, and its tensors."""

    found: Mapping[str, Any]
    pieces: tuple[Piece, ...]


class Journal:
    """The steps of one run; a context manager.

    run: what makes two runs the same, as JSON. A journal of another run is thrown away: ``restarted`` says so.
    """

    def __init__(self, workspace: Path, run: Mapping[str, Any]) -> None:
        self._path, self._spool_path = workspace / JOURNAL, workspace / SPOOL
        self._records: dict[str, Record] = {}
        self._end = 0  # of the spool
        self._run = json.loads(json.dumps(run))  # as it comes back from a file
        self.restarted = False

    def __enter__(self) -> Self:
        kept = self._read()
        self.resumed = len(self._records)
        self._journal: BinaryIO = self._path.open("ab")
        self._journal.truncate(kept)
        self._spool: BinaryIO = self._spool_path.open("ab")
        self._spool.truncate(self._end)
        if not kept:
            self._write(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        self._spool.close()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def __len__(self) -> int:
        return len(self._records)

    def put(self, key: str, found: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor, str]] = ()) -> Record:
        """Write down a finished step with its CPU tensors: (name, tensor, group of its piece)."""
        described = []
        for name, tensor, group in tensors:
            content = bytes_of(tensor)
            self._spool.write(content)
            described.append(
                {
                    "name": name,
                    "dtype": BY_TORCH[tensor.dtype].code,
                    "shape": list(tensor.shape),
                    "group": group,
                    "start": self._end,
                    "hash": xxh3_128_hexdigest(content),
                }
            )
            self._end += len(content)
        # The tensors first: a line must never speak of bytes that are not there.
        self._spool.flush()
        line = {"key": key, "found": found, "tensors": described}
        self._write(line)
        self._records[key] = self._record(line)
        return self._records[key]

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, sort_keys=True, separators=(",", ":"))
        self._journal.write(f"{xxh3_128_hexdigest(text.encode())} {text}\n".encode("ascii"))
        self._journal.flush()

    def _read(self) -> int:
        """Read what an earlier run left; return how many bytes of its journal count."""
        if not self._path.exists() or not self._spool_path.exists():
            return 0
        kept = 0
        for raw in self._path.read_bytes().splitlines(keepends=True):
            line = _parsed(raw)
            if kept == 0 and line != self._run:
                self.restarted = True
                return 0
            if line is None or (kept and not self._is_sound(line)):
                break
            if kept:
                self._records[line["key"]] = self._record(line)
                self._end = max([self._end, *(end for _, end in _spans(line))])
            kept += len(raw)
        return kept

    def _is_sound(self, line: Any) -> bool:
        match line:
            case {"key": str(), "found": dict(), "tensors": list()}:
                pass
            case _:
                return False
        size = self._spool_path.stat().st_size
        for tensor, (start, end) in zip(line["tensors"], _spans(line), strict=True):
            if end > size or xxh3_128_hexdigest(map_bytes(self._spool_path, start, end - start)) != tensor["hash"]:
                return False
        return True

    def _record(self, line: Mapping[str, Any]) -> Record:
        pieces = [
            Piece(
                tensor["name"],
                BY_CODE[tensor["dtype"]],
                tuple(tensor["shape"]),
                tensor["group"],
                partial(map_bytes, self._spool_path, start, end - start),
            )
            for tensor, (start, end) in zip(line["tensors"], _spans(line), strict=True)
        ]
        return Record(line["found"], tuple(pieces))


def _parsed(raw: bytes) -> Any:
    """Return the JSON of a line; None when it is not whole."""
    digest, _, text = raw.decode("ascii", "replace").partition(" ")
    if not text.endswith("\n") or xxh3_128_hexdigest(text[:-1].encode()) != digest:
        return None
    return json.loads(text)


def _spans(line: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return first and last byte, exclusive, of each tensor of a line in the spool."""
    spans = []
    for tensor in line["tensors"]:
        piece = Piece(tensor["name"], BY_CODE[tensor["dtype"]], tuple(tensor["shape"]), tensor["group"])
        spans.append((tensor["start"], tensor["start"] + piece.nbytes))
    return spans
