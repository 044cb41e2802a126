"""Hashes against bit rot: one of 16 bytes per stored tensor, and one over the header that holds them.

The manifest's ``hashes`` hold ``tensors``, the digests of all tensors of the file in the order of their data, 16 bytes
each, in base64; and ``header``, the digest in hexadecimal of the file's length field and header with this digest
itself replaced by zeros. Both are xxHash's 128-bit XXH3. Any single changed byte of a file is found. A digest a tensor
under its own name would take twice the room.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from xxhash import xxh3_128

from tcompress.checkpoint.manifest import METADATA_KEY, is_compressed
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.safetensors_file import OF_MANIFEST, SafetensorsFile, parse_object
from tcompress.errors import InputError

DIGEST_BYTES = 16
BLANK = "0" * (2 * DIGEST_BYTES)
_CHUNK = 8 << 20


def pack_digests(digests: Iterable[bytes]) -> str:
    """Return the text that stands in the manifest for the digests of a file's tensors."""
    return base64.b64encode(b"".join(digests)).decode()


def header_digest(blank_header: bytes) -> str:
    """Return the digest of a header whose own digest is still ``BLANK``."""
    return xxh3_128(blank_header).hexdigest()


def damage(file: SafetensorsFile) -> list[str]:
    """Return what is wrong with a compressed file, a sentence each; an empty list when every byte is as written."""
    manifest = file.metadata.get(METADATA_KEY)
    if manifest is None:
        return [f"{file.path}: it has no tcompress manifest"]
    match parse_object(manifest.encode(), file.path, OF_MANIFEST).get("hashes"):
        case {"tensors": str(packed), "header": str(digest)}:
            pass
        case _:
            return [f"{file.path}: its manifest has no hashes"]
    problems = []
    if len(digest) != len(BLANK) or not digest.isascii() or file.header.count(digest.encode()) != 1:
        problems.append(f"{file.path}: the hash of its header is damaged")
    elif header_digest(file.header.replace(digest.encode(), BLANK.encode())) != digest:
        problems.append(f"{file.path}: its header was changed after it was written")
    try:
        expected = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        expected = b""
    if len(expected) != DIGEST_BYTES * len(file):
        return [*problems, f"{file.path}: it has not one hash for each tensor"]
    for position, name in enumerate(file):
        if _digest(file.chunks(name)) != expected[position * DIGEST_BYTES : (position + 1) * DIGEST_BYTES]:
            problems.append(f"{file.path}: tensor {name}: its data was changed after it was written")
    return problems


def require_whole(checkpoint: Checkpoint) -> None:
    """Raise InputError where a byte of a compressed checkpoint is not as it was written; every one is read for it.

    Whoever writes something new from a compressed checkpoint asks this first: what is written gets hashes of its own,
    or none, and would hide the damage for good.
    """
    for shard in checkpoint.shards if is_compressed(checkpoint) else ():
        for problem in damage(shard) if isinstance(shard, SafetensorsFile) else ():
            raise InputError(problem.removeprefix(f"{shard.path}: "), path=shard.path)


def _digest(chunks: Iterable[memoryview]) -> bytes:
    found = xxh3_128()
    for chunk in chunks:
        found.update(chunk)
    return found.digest()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the values of CPU tensors: the same for the same bits in the same order."""
    found = xxh3_128()
    for tensor in tensors:
        found.update(bytes_of(tensor))
    return found.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_files(paths: Iterable[Path]) -> str:
    """Return a file's SHA-256; of several, that of the lines ``<sha256>  <name>`` in the order of their names.

    ``sha256sum *.safetensors | sha256sum`` gives the same for a folder of shards.
    """
    digests = {path.name: sha256_of_file(path) for path in paths}
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
