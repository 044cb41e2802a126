"""Several weight files behind one index, in the Hugging Face convention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.safetensors_file import parse_object
from tcompress.errors import InputError, listed

MAX_INDEX_BYTES = 64 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class ShardedCheckpoint(Checkpoint):
    """The tensors of all shards that an index file names.

    open_file: how one shard is opened.

    Raises InputError when the index names files outside its folder, shards that are missing, tensors that are not
    where it says, or says nothing of tensors that are there.
    """

    sharded = True

    def __init__(self, index: Path, open_file: Callable[[Path], Checkpoint]) -> None:
        self.path = self.folder = index.parent
        self.index = index
        weight_map, self.index_metadata = _read_index(index)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
        if missing:
            raise InputError(f"names shards that are not there: {listed(missing)}", path=index)
        self.files = tuple(index.parent / name for name in names)
        self._shards = tuple(open_file(path) for path in self.files)
        self._home = {name: shard for shard in self._shards for name in shard}
        _check_agreement(weight_map, self._shards, index)
        self.infos = {name: shard[name] for name, shard in self._home.items()}
        self.metadata = {key: value for shard in self._shards for key, value in shard.metadata.items()}
        self.tied = {second: first for shard in self._shards for second, first in shard.tied.items()}
        self.other_values = ()
        self.key = None

    @property
    def shards(self) -> tuple[Checkpoint, ...]:
        return self._shards

    def read(self, name: str) -> torch.Tensor:
        return self._home[name].read(name)

    def raw(self, name: str) -> memoryview:
        return self._home[name].raw(name)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def _read_index(index: Path) -> tuple[dict[str, str], Mapping[str, object]]:
    try:
        if not index.is_file():
            raise InputError("is not a regular file", path=index)
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise InputError(f"is larger than {MAX_INDEX_BYTES} bytes, too large for an index", path=index)
        content = parse_object(index.read_bytes(), index)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=index) from error
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no weight_map from tensor names to shards", path=index)
    for name, shard in weight_map.items():
        # The string is judged, not where it leads: shards of a download cache are links by right.
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise InputError(f"names {shard!r} as its shard, which is no plain file name", path=index, tensor=name)
    metadata = content.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _check_agreement(weight_map: Mapping[str, str], shards: tuple[Checkpoint, ...], index: Path) -> None:
    there: dict[str, str] = {}
    for shard in shards:
        for name in shard:
            if name in there:
                raise InputError(f"lies in {there[name]} and again in {shard.path.name}", path=index, tensor=name)
            there[name] = shard.path.name
    for name, shard_name in weight_map.items():
        if there.get(name) != shard_name:
            raise InputError(f"is not in {shard_name}, where the index has it", path=index, tensor=name)
    for name, shard_name in there.items():
        if name not in weight_map:
            raise InputError(f"lies in {shard_name}, but the index does not name it", path=index, tensor=name)
