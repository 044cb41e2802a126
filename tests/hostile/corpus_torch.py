"""Torch checkpoints: pickles that run code, archives that lie, tensors that are larger than they are."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from tests.hostile.case import dense, file_of, refused, tensors_of, weight
from tests.hostile.corpus_dense import FIRST, INDEX, SECOND

CANARY = "canary"  # what a pickle leaves behind, beside the checkpoint, when its code runs
AGAIN = "download or save it again"
CODE = "holds pickled code or objects"


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def in_zip(pickled: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return content.getvalue()


def in_legacy(pickled: bytes) -> bytes:
    before = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(each, 2) for each in before) + pickled + pickle.dumps([], 2)


FORMS: dict[str, Callable[[bytes], bytes]] = {"zip": in_zip, "legacy": in_legacy}


def saved(tree: object, *, as_zip: bool = True) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(tree, content, _use_new_zipfile_serialization=as_zip)
    return content.getvalue()


def pt(content: bytes) -> Callable[[Path], Path]:
    return file_of(content, "model.pt")


def touch(folder: Path) -> bytes:
    return text(f"touch '{folder.parent / CANARY}'")


def python(folder: Path) -> bytes:
    return text(f"open({str(folder.parent / CANARY)!r}, 'w').close()")


# What calls whom with which argument; each is code that works, once it is unpickled.
CALLS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "os.system": ("os system", touch),
    "posix.system": ("posix system", touch),
    "os.popen": ("os popen", touch),
    "subprocess.getoutput": ("subprocess getoutput", touch),
    "builtins.eval": ("builtins eval", python),
    "builtins.exec": ("builtins exec", python),
    "timeit.timeit": ("timeit timeit", python),
    "torch.serialization.os.system": ("torch serialization.os.system", touch),
    "torch.storage.os.system": ("torch.storage os.system", touch),
    "collections.abc.sys.modules": ("collections abc.sys.modules", touch),
    "builtins.__import__": ("builtins __import__", lambda _: text("antigravity")),
    "builtins.getattr": ("builtins getattr", lambda _: text("x")),
    "operator.attrgetter": ("operator attrgetter", lambda _: text("x")),
    "copyreg.add_extension": ("copyreg add_extension", lambda _: text("x")),
    "copyreg._reconstructor": ("copyreg _reconstructor", lambda _: text("x")),
    "torch.load": ("torch load", lambda _: text("x")),
    "torch.nn.Linear": ("torch.nn.modules.linear Linear", lambda _: text("x")),
    "torch._utils._rebuild_anything": ("torch._utils _rebuild_anything", lambda _: text("x")),
    "torch.float32\x1b[2J": ("torch float32\x1b[2J", lambda _: text("x")),
}


def calling(name: str, argument: bytes) -> bytes:
    module, attribute = name.split(" ", 1)
    return b"\x80\x02}" + text("w") + f"c{module}\n{attribute}\n".encode() + argument + b"\x85Rs."


def evil(form: Callable[[bytes], bytes], make: Callable[[Path], bytes]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        return pt(form(make(folder)))(folder)

    return build


for name, (path, argument) in CALLS.items():
    for kind, form in FORMS.items() if name in {"os.system", "builtins.eval"} else [("zip", in_zip)]:
        pickled = evil(form, lambda folder, path=path, argument=argument: calling(path, argument(folder)))
        refused(f"{kind} calls {name}", pickled, CODE, path.replace(" ", ".").replace("\x1b", r"\x1b"))

WAYS: dict[str, Callable[[Path], bytes]] = {
    "INST": lambda folder: b"\x80\x02(" + touch(folder) + b"ios\nsystem\n.",
    "OBJ": lambda folder: b"\x80\x02(cos\nsystem\n" + touch(folder) + b"o.",
    "NEWOBJ": lambda folder: b"\x80\x02cos\nsystem\n" + touch(folder) + b"\x85\x81.",
    "NEWOBJ_EX": lambda folder: b"\x80\x04cos\nsystem\n" + touch(folder) + b"\x85}\x92.",
    "STACK_GLOBAL": lambda folder: b"\x80\x04\x8c\x02os\x8c\x06system\x93" + touch(folder) + b"\x85R.",
    "protocol 0": lambda folder: f"cos\nsystem\n(S'touch {folder.parent / CANARY}'\ntR.".encode(),
    "EXT1": lambda folder: b"\x80\x02\x82\x01" + touch(folder) + b"\x85R.",
    "EXT2": lambda folder: b"\x80\x02\x83\x01\x00" + touch(folder) + b"\x85R.",
    "EXT4": lambda folder: b"\x80\x02\x84\x01\x00\x00\x00" + touch(folder) + b"\x85R.",
    "PERSID": lambda _: b"\x80\x02Pos.system\n.",
    "BINPERSID": lambda folder: (
        b"\x80\x02(" + text("storage") + b"cos\nsystem\n" + touch(folder) + text("cpu") + b"K\x01tQ."
    ),
    "BUILD": lambda _: b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__class__") + b"cos\nsystem\nsb.",
    "second pickle": lambda folder: b"\x80\x02}." + calling("os system", touch(folder)),
    "string as function": lambda folder: b"\x80\x02" + text("os.system") + touch(folder) + b"\x85R.",
    "storage that is a call": lambda folder: b"\x80\x02ctorch\nEvilStorage\n" + touch(folder) + b"\x85R.",
    "size of text": lambda folder: b"\x80\x02ctorch\nSize\n" + touch(folder) + b"\x85R.",
    "device of text": lambda folder: b"\x80\x02}" + text("w") + b"ctorch\ndevice\n" + touch(folder) + b"\x85Rs.",
    "tensor of nothing": lambda _: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "tensor of text": lambda folder: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + touch(folder) * 6 + b"tR.",
    "tensor with hooks": lambda folder: (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n" + touch(folder) + b"\x85}tR."
    ),
    "set item on text": lambda folder: b"\x80\x02" + text("a") + text("b") + touch(folder) + b"s.",
}
for name, pickled in WAYS.items():
    for kind, form in FORMS.items() if name in {"INST", "STACK_GLOBAL", "EXT1"} else [("zip", in_zip)]:
        refused(f"{kind} by {name}", evil(form, pickled))


def code_in_a_shard(folder: Path) -> Path:
    names = {"a.weight": FIRST, "b.weight": SECOND.replace(".safetensors", ".bin")}
    (folder / FIRST).write_bytes(dense_shard())
    (folder / names["b.weight"]).write_bytes(in_zip(calling("os system", touch(folder))))
    (folder / INDEX).write_text('{"weight_map": ' + str(names).replace("'", '"') + "}")
    return folder


def dense_shard() -> bytes:
    return tensors_of({"a.weight": weight()})


def code_behind_a_safetensors_header(folder: Path) -> Path:
    return file_of(in_zip(calling("os system", touch(folder))))(folder)


def code_in_the_working_folder(folder: Path) -> Path:
    """A folder that looks like a package: nothing of it is imported."""
    program = f"open({str(folder.parent / CANARY)!r}, 'w').close()\n"
    for name in ("modeling_evil.py", "__init__.py", "torch.py", "sitecustomize.py", "conftest.py"):
        (folder / name).write_text(program)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_evil.Evil"}, "trust_remote_code": true}')
    (folder / "model.safetensors").write_bytes(dense_shard())
    return folder


refused("code in a shard", code_in_a_shard, CODE, "os.system")
refused("pickle called safetensors", code_behind_a_safetensors_header, "not a safetensors file")
dense("Python files beside the model", code_in_the_working_folder)


# Pickles that take time or memory, and run no code.

BOMBS: dict[str, tuple[bytes, int, str]] = {
    "ten thousand nested lists": (b"}" + text("x") + b"]" * 10_000 + b"a" * 9_999 + b"s", 4, "holds no tensors"),
    "ten thousand nested dicts": ((b"}" + text("a")) * 10_000 + b"}" + b"s" * 10_000, 4, ""),
    "a dict in itself": (b"}q\x00" + text("a") + b"h\x00s", 4, "contains itself"),
    "a list in itself": (b"]q\x00h\x00a", 4, "holds a list"),
    "tuples that double, as a key": (b"}q\x01)" + b"q\x00h\x00\x86" * 60 + b"K\x01s", 5, "makes tuples"),
    "tuples that double, in a set": (
        b"c__builtin__\nset\n)" + b"q\x00h\x00\x86" * 60 + b"\x85\x85R",
        5,
        "makes tuples",
    ),
    "tuples that double, as a storage": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n)" + b"q\x00h\x00\x86" * 60 + text("cpu") + b"K\x01tQ",
        5,
        "makes tuples",
    ),
    "a bytearray of a terabyte": (b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R", 4, "bytes objects"),
    "an encoding that doubles": (b"c_codecs\nencode\n" + text("x") + text("hex") + b"\x86R", 4, "bytes objects"),
    "a number of a million digits": (
        b"}" + text("x") + b"\x8b" + struct.pack("<I", 400_000) + b"\x7f" * 400_000 + b"s",
        4,
        "",
    ),
    "text of 4 GB announced": (b"X\xff\xff\xff\xff", 4, ""),
    "memo of 2^31": (b"}r\xff\xff\xff\x7f", 4, ""),
    "an empty stack": (b"R", 4, "is damaged"),
    "an unknown opcode": (b"\xff", 4, AGAIN),
    "protocol 255": (b"\x80\xff}", 4, "protocol 255"),
    "nothing": (b"N", 4, "holds a NoneType"),
    "keys of bytes": (b"}U\x01as", 4, ""),
    "a name with half a character": (b"}X\x03\x00\x00\x00\xed\xa0\x80K\x01s", 4, ""),
}
for name, (pickled, code, problem) in BOMBS.items():
    for kind, form in FORMS.items() if "double" in name else [("zip", in_zip)]:
        refused(f"{kind} of {name}", pt(form(b"\x80\x02" + pickled + b".")), problem, code=code)


# Archives.


def repacked(change: Callable[[dict[str, bytes]], object], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a sound archive with members added, changed or taken away, in folder ``archive``."""
    with zipfile.ZipFile(io.BytesIO(saved({"fc.weight": weight(), "last": torch.ones(16)}))) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def doubled(name: str) -> bytes:
    content = io.BytesIO(repacked(lambda _: None))
    with warnings.catch_warnings(), zipfile.ZipFile(content, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(name, b"x")
    return content.getvalue()


def nothing(_: dict[str, bytes]) -> None:
    """The archive as it is."""


def flipped(content: bytes, at: int, mask: int) -> bytes:
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


PLAIN = repacked(nothing)
PLACE = PLAIN.rindex(b"PK\x01\x02")
ARCHIVES: dict[str, tuple[bytes, str]] = {
    "deflated members": (repacked(nothing, zipfile.ZIP_DEFLATED), "compressed"),
    "zip bomb": (
        repacked(lambda m: m.update({"archive/data/0": bytes(50_000_000)}), zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "LZMA members": (repacked(nothing, zipfile.ZIP_LZMA), "compressed"),
    "two pickles": (doubled("archive/data.pkl"), "there twice"),
    "a storage twice": (doubled("archive/data/0"), "there twice"),
    "pickles in two folders": (doubled("other/data.pkl"), "2 data.pkl"),
    "member outside": (doubled("../evil"), "'..' name"),
    "member with an absolute name": (doubled("/evil"), "absolute"),
    "TorchScript": (doubled("archive/constants.pkl"), "TorchScript"),
    "TorchScript code": (doubled("archive/code/x.py"), "TorchScript"),
    "big-endian": (repacked(lambda m: m.update({"archive/byteorder": b"big"})), "big-endian"),
    "byteorder of 1 MB": (repacked(lambda m: m.update({"archive/byteorder": bytes(1 << 20)})), "byteorder has"),
    "no pickle": (repacked(lambda m: m.pop("archive/data.pkl")), "0 data.pkl"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "not a file that torch.save wrote"),
    "encrypted member": (flipped(PLAIN, PLACE + 8, 1), "encrypted"),
    "another zip": (repacked(lambda m: (m.clear(), m.update({"word/document.xml": b"<x/>"}))), "0 data.pkl"),
    "half a zip": (PLAIN[: len(PLAIN) // 2], AGAIN),
    "zip without its end": (PLAIN[:-5], AGAIN),
    "zip of its head": (PLAIN[:10], AGAIN),
    "offset beyond the file": (flipped(PLAIN, PLACE + 45, 0x7F), AGAIN),
    "size beyond the file": (flipped(PLAIN, PLACE + 27, 0x7F), AGAIN),
    "record missing": (repacked(lambda m: m.pop("archive/data/0")), ""),
    "record too short": (repacked(lambda m: m.update({"archive/data/1": bytes(20)})), ""),
    "record empty": (repacked(lambda m: m.update({"archive/data/1": b""})), ""),
    "trailing pickle in data.pkl": (in_zip(pickle.dumps({}, 2) * 2), "holds no tensors"),
}
for name, (content, problem) in ARCHIVES.items():
    refused(f"archive: {name}", pt(content), problem, code=5 if "1 MB" in name else 4)


def tar(folder: Path) -> Path:
    with tarfile.open(folder / "model.th", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = 9
            archive.addfile(info, io.BytesIO(b"\x80\x02cos\nsys"))
    return folder / "model.th"


refused("archive: tar", tar, "is a tar archive of a PyTorch before 0.2")
for name, content in {"text": b"hello\n" * 100, "zeros": bytes(2000), "bare pickle": pickle.dumps({"w": 1}, 2)}.items():
    refused(f"archive: {name}", pt(content), "not a file that torch.save wrote")
refused("archive: empty", pt(b""), "is empty")


# Tensors.


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


def with_attribute() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.note = "mine"  # type: ignore[attr-defined]
    return tensor


STRANGE: dict[str, tuple[torch.Tensor, int, str]] = {
    "sparse": (torch.eye(3).to_sparse(), 4, "is sparse"),
    "sparse rows": (csr(), 4, "is sparse"),
    "quantized": (quantized(), 4, "is quantized"),
    "with attributes": (with_attribute(), 4, "carries Python attributes"),
    "without data": (torch.empty(3, device="meta"), 4, "is a meta tensor"),
    "complex128": (torch.ones(3, dtype=torch.complex128), 4, "is complex128"),
    "conjugate": (torch.ones(3, dtype=torch.complex64).conj(), 4, "conjugate"),
    "of terabytes": (torch.zeros(1).expand(1 << 20, 1 << 20), 5, "claims 4398046511104 bytes but stores 4"),
}
for name, (tensor, code, problem) in STRANGE.items():
    for kind in FORMS if code == 5 else ["zip"]:
        content = saved({"fine": torch.ones(2), "odd.one": tensor}, as_zip=kind == "zip")
        refused(f"{kind} tensor {name}", pt(content), problem, tensor="odd.one", code=code)
ESCAPED = saved({"a\n\x1b[2J": torch.ones(2, dtype=torch.complex128)})
refused("tensor of control characters", pt(ESCAPED), "is complex128", tensor=r"a\n\x1b[2J")
BASE = torch.zeros(100_000)
VIEWS = saved({f"w{n}": BASE[n : 90_000 + n] for n in range(300)})
refused("views of the same bytes", pt(VIEWS), "claim 108000000 bytes", code=5)


def with_bytes(old: bytes, new: bytes) -> bytes:
    def change(members: dict[str, bytes]) -> None:
        pickled = next(name for name in members if name.endswith("data.pkl"))
        assert members[pickled].count(old) == 1, members[pickled].count(old)
        members[pickled] = members[pickled].replace(old, new)

    return repacked(change)


SIZES = b"K0K(\x86"  # the shape (48, 40)
refused("tensor beyond its storage", pt(with_bytes(SIZES, b"K1K(\x86")))
refused("tensor of negative size", pt(with_bytes(SIZES, b"J\xff\xff\xff\xffK(\x86")))
refused("tensor of 2^62 rows", pt(with_bytes(SIZES, b"\x8a\x08\0\0\0\0\0\0\0\x40K(\x86")))
refused("storage of 2^40 values", pt(with_bytes(b"M\x80\x07t", b"\x8a\x06\0\0\0\0\0\x01t")))


# State dicts.


def deep(levels: int) -> dict[str, object]:
    tree: dict[str, object] = {"w": torch.ones(2)}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


def circular() -> dict[str, object]:
    tree: dict[str, object] = {"w": torch.ones(2)}
    tree["inner"] = {"tree": tree}
    return tree


TREES: dict[str, tuple[object, int, str]] = {
    "nested 60 deep": (deep(60), 4, "nested deeper than 50"),
    "contains itself": (circular(), 4, "contains itself"),
    "two candidates": ({"a\x1b": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}}, 4, r"a\x1b, b"),
    "colliding names": ({"a.w": torch.ones(2), "a": {"w": torch.ones(2)}}, 4, "tensor a.w: is there twice"),
    "keys of None": ({"w": torch.ones(2), None: torch.ones(2)}, 4, "NoneType"),
    "keys of tuples": ({"w": torch.ones(2), ("a", "b"): torch.ones(2)}, 4, "tuple"),
    "name of 5000 characters": ({"w" * 5000: torch.ones(2)}, 4, "4096 characters"),
    "name with half a character": ({"w\ud800": torch.ones(2)}, 4, "no Unicode text"),
    "only numbers": ({"epoch": 3}, 4, "holds no tensors"),
    "a tensor": (torch.ones(2), 4, "holds a Tensor"),
    "a list": ([torch.ones(2)], 4, "holds a list"),
    "a module": (torch.nn.Linear(2, 2), 4, "torch.nn.modules.linear.Linear"),
}
for name, (tree, code, problem) in TREES.items():
    refused(f"state dict: {name}", pt(saved(tree)), problem, code=code)
ODD_KEYS = {"::error::\x1b[2J\n": 3, "[red]": "x", "state_dict": {"fc.weight": weight()}}
dense("state dict beside values of odd names", pt(saved(ODD_KEYS)))
dense("state dict under an odd name", pt(saved({"\n::error::x\x1b": {"fc.weight": weight()}})))
TIED = weight()
SOUND = OrderedDict(
    {
        "fc.weight": TIED,
        "tied.weight": TIED,
        "t.weight": weight(seed=1).t(),
        "steps": torch.tensor(7),
        "none": torch.empty(0, 3),
        "wide.weight": torch.ones(40).expand(48, 40),
        "row": TIED[0],
    }
)
for kind in FORMS:
    dense(f"{kind} of ties and views", pt(saved(SOUND, as_zip=kind == "zip")))
