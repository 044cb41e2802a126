import contextlib
import errno
import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.torch_file import TorchFile
from tcompress.errors import InputError, SafetyError, UnsupportedError, UsageError

ROOT = Path(__file__).parent.parent.parent
# Before 2.11 PyTorch does not say where in the file a tensor without data lies: such files are read into memory.
MAPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
MODELS = ROOT.parent / "shared" / "data" / "models"
ZIP_AND_LEGACY = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def save(tree, path, *, as_zip=True):
    torch.save(tree, path, _use_new_zipfile_serialization=as_zip)
    return path


def repack(path, *, replace=None, compression=zipfile.ZIP_STORED, add=()):
    """Write the archive anew with Python's zipfile: without alignment, with other or more members."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    folder = next(iter(members)).partition("/")[0]
    members.update({f"{folder}/{name}": content for name, content in (replace or {}).items()})
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*members.items(), *((f"{folder}/{name}", content) for name, content in add)]:
            archive.writestr(name, content)
    return path


def zip_of(pickled, path):
    """Write an archive around a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def refused(kind, path, *parts, key=None):
    with pytest.raises((InputError, SafetyError, UsageError)) as caught:
        TorchFile(path, key)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert "weights_only" not in message
    reason = message.removeprefix(f"{path}: ")  # the path holds the name of the test
    for part in parts:
        assert part in reason
    return reason


def assert_reads(path, expected, **options):
    with TorchFile(path, **options) as checkpoint:
        assert list(checkpoint) == list(expected)
        for name, tensor in expected.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert checkpoint[name].shape == tuple(tensor.shape)
            assert checkpoint[name].dtype is BY_TORCH[tensor.dtype]
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert bytes(checkpoint.raw(name)) == raw
            assert found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == raw


# What is read.


@ZIP_AND_LEGACY
def test_a_flat_state_dict_reads_as_it_was_saved(path, as_zip):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    assert_reads(save(model.state_dict(), path, as_zip=as_zip), model.state_dict())


@ZIP_AND_LEGACY
def test_every_element_type_of_pytorch_reads_bit_exactly(path, as_zip):
    # uint8 viewed as the type: every bit pattern counts, also those of NaN.
    data = torch.arange(64, dtype=torch.uint8)
    state = {dtype.name: data.clone().view(torch_type) for torch_type, dtype in BY_TORCH.items()}
    state["bool"] = data % 3 == 0
    if not as_zip:  # PyTorch writes the types without a storage class of their own, but fails to load them
        state = {
            name: tensor for name, tensor in state.items() if name[:6] not in {"uint16", "uint32", "uint64", "float8"}
        }
    assert_reads(save(state, path, as_zip=as_zip), state)


@ZIP_AND_LEGACY
def test_scalars_and_empty_tensors_are_tensors(path, as_zip):
    state = {"scalar": torch.tensor(3.5), "none": torch.empty(0), "rows": torch.empty(0, 4), "w": torch.ones(2, 2)}
    assert_reads(save(state, path, as_zip=as_zip), state)


@ZIP_AND_LEGACY
def test_transposed_and_sliced_views_read_in_their_own_order(path, as_zip):
    base = torch.arange(120.0).reshape(4, 5, 6)
    state = {"t": base.transpose(0, 2), "slice": base[1:3, ::2, 1:], "row": base[2], "wide": torch.ones(3).expand(4, 3)}
    assert_reads(save(state, path, as_zip=as_zip), state)


def test_large_views_are_mapped_in_their_own_order(path):
    base = torch.arange(2_000_000, dtype=torch.int32).reshape(1000, 2000)
    state = {"t": base.t(), "part": base[17:900, 3:1990]}
    assert_reads(save(state, path), state)


def test_a_repacked_archive_without_alignment_reads_the_same(path):
    state = {"large": torch.randn(600, 601, dtype=torch.float64), "small": torch.randn(3)}
    assert_reads(repack(save(state, path)), state)


@pytest.mark.parametrize("name", ["epoch=3:best.pt", "модель.pt", "a b.tar.gz.bin"])
def test_the_name_of_the_file_does_not_matter(tmp_path, name):
    assert_reads(save({"w": torch.ones(3)}, tmp_path / name), {"w": torch.ones(3)})


def test_a_zip_file_and_a_legacy_file_of_one_model_agree(tmp_path):
    state = {"a": torch.randn(3, 4), "b": torch.randn(4).half(), "n": torch.tensor(7)}
    with (
        TorchFile(save(state, tmp_path / "zip.pt")) as new,
        TorchFile(save(state, tmp_path / "old.pt", as_zip=False)) as old,
    ):
        assert new.infos == old.infos
        assert [bytes(new.raw(name)) for name in new] == [bytes(old.raw(name)) for name in old]


@ZIP_AND_LEGACY
def test_parameters_count_as_tensors(path, as_zip):
    state = OrderedDict(weight=torch.nn.Parameter(torch.randn(3, 2)))
    assert_reads(save(state, path, as_zip=as_zip), state)


def test_a_pytorch_that_notes_no_offsets_reads_the_file_into_memory(path, monkeypatch):
    real = torch.load

    def load(stream, *, map_location, **options):
        loaded = real(stream, map_location="cpu", **options)
        return loaded.to("meta") if map_location == "meta" else loaded

    state = {"w": torch.randn(4, 4).t(), "b": torch.randn(4)}
    save(state, path)
    monkeypatch.setattr(torch, "load", load)
    assert_reads(path, state)


def test_tensors_outlive_the_checkpoint_and_never_change_the_file(path):
    save({"w": torch.ones(600, 600)}, path)
    before = path.read_bytes()
    with TorchFile(path) as checkpoint:
        weight = checkpoint.read("w")
    weight.zero_()
    assert weight.sum() == 0
    assert path.read_bytes() == before


def test_bytes_of_a_contiguous_tensor_are_not_to_be_written(path):
    with TorchFile(save({"w": torch.ones(2)}, path)) as checkpoint:
        assert checkpoint.raw("w").readonly


def test_a_checkpoint_knows_its_file_and_has_no_metadata(path):
    with TorchFile(save({"w": torch.ones(2)}, path)) as checkpoint:
        assert (checkpoint.path, checkpoint.files, checkpoint.metadata) == (path, (path,), {})


# Which tensors are chosen.


def test_the_usual_entry_is_found_and_the_rest_is_named(path):
    save({"epoch": 3, "state_dict": {"w": torch.ones(2)}, "optimizer": {"state": {0: torch.ones(2)}}}, path)
    with TorchFile(path) as checkpoint:
        assert checkpoint.key == "state_dict"
        assert list(checkpoint) == ["w"]
        assert checkpoint.other_values == ("epoch", "optimizer")


def test_the_order_of_the_usual_names_decides_among_them(path):
    save({"ema": {"w": torch.zeros(2)}, "model": {"w": torch.ones(2)}}, path)
    with TorchFile(path) as checkpoint:
        assert checkpoint.key == "model"


def test_a_number_beside_the_state_dict_is_no_weight(path):
    save({"state_dict": {"w": torch.ones(2)}, "best_accuracy": torch.tensor(93.1)}, path)
    with TorchFile(path) as checkpoint:
        assert checkpoint.key == "state_dict"
        assert checkpoint.other_values == ("best_accuracy",)


def test_weights_at_the_top_win_over_a_usual_name(path):
    state = {"w": torch.ones(2), "model": {"w": torch.zeros(3)}}
    assert_reads(save(state, path), {"w": state["w"], "model.w": state["model"]["w"]})


def test_the_only_entry_with_tensors_is_chosen_whatever_its_name(path):
    save({"mine": {"w": torch.ones(2)}, "epoch": 3, "settings": {"rate": 0.1}}, path)
    with TorchFile(path) as checkpoint:
        assert checkpoint.key == "mine"


def test_nested_dicts_flatten_with_dots_and_values_that_are_no_tensors_are_named(path):
    state = {"encoder": {"weight": torch.ones(2)}, "heads": [torch.ones(2)], "n": 3, "none": None, "empty": {}}
    save({"state_dict": state, "epoch": 1}, path)
    with TorchFile(path) as checkpoint:
        assert list(checkpoint) == ["encoder.weight"]
        others = ("epoch", "state_dict.heads", "state_dict.n", "state_dict.none", "state_dict.empty")
        assert checkpoint.other_values == others


def test_whole_number_keys_become_text(path):
    assert_reads(save({0: torch.ones(2), 1: torch.zeros(2)}, path), {"0": torch.ones(2), "1": torch.zeros(2)})


def test_a_dict_that_is_there_twice_is_read_twice(path):
    shared = {"w": torch.ones(2)}
    with TorchFile(save({"model": {"a": shared, "b": shared}}, path)) as checkpoint:
        assert checkpoint.tied == {"b.w": "a.w"}


def test_a_key_overrides_the_choice_and_walks_along_dots(path):
    save({"model": {"w": torch.zeros(2)}, "a": {"b": {"w": torch.ones(2)}, "c": 1}}, path)
    assert_reads(path, {"w": torch.ones(2)}, key="a.b")
    with TorchFile(path, "a.b") as checkpoint:
        assert checkpoint.key == "a.b"
        assert checkpoint.other_values == ("model", "a.c")


def test_a_key_that_has_a_dot_itself_is_found(path):
    save({"model": {"w": torch.zeros(2)}, "a.b": {"w": torch.ones(2)}}, path)
    assert_reads(path, {"w": torch.ones(2)}, key="a.b")


def test_a_missing_key_lists_those_that_exist(path):
    save({"model": {"w": torch.ones(2)}, "epoch": 1}, path)
    refused(UsageError, path, "has no entry ema; there are: model, epoch", key="ema")
    refused(UsageError, path, "has no entry model.x; there are: model.w", key="model.x")
    refused(UsageError, path, "its entry epoch is a int", key="epoch")


def test_several_possible_entries_ask_for_a_key(path):
    save({"teacher": {"w": torch.ones(2)}, "student": {"w": torch.ones(2)}}, path)
    refused(InputError, path, "teacher, student", "--key")


@pytest.mark.parametrize("tree", [{}, {"epoch": 3}, {"model": {}}, {"lists": [torch.ones(2)]}])
def test_a_dict_without_tensors_is_refused(path, tree):
    refused(InputError, save(tree, path), "holds no tensors")


@pytest.mark.parametrize("tree", [torch.ones(2), [torch.ones(2)], 3, None])
def test_anything_but_a_dict_is_refused(path, tree):
    refused(InputError, save(tree, path), type(tree).__name__, "save model.state_dict()")


def test_colliding_names_are_refused(path):
    save({"a.w": torch.ones(2), "a": {"w": torch.ones(2)}}, path)
    refused(InputError, path, "tensor a.w", "twice")
    refused(InputError, save({1: torch.ones(2), "1": torch.ones(2)}, path), "tensor 1", "twice")


@pytest.mark.parametrize("key", [None, True, 1.5, ("a", "b")])
def test_keys_that_are_no_text_are_refused(path, key):
    refused(InputError, save({"w": torch.ones(2), key: torch.ones(2)}, path), type(key).__name__)


def test_names_that_no_file_can_hold_are_refused(path):
    refused(InputError, save({"w\ud800": torch.ones(2)}, path), "no Unicode text")
    refused(InputError, save({"w" * 5000: torch.ones(2)}, path), "4096 characters")


def test_control_characters_of_a_name_do_not_reach_the_terminal(path):
    message = refused(UnsupportedError, save({"w\x1b[2J\n": torch.ones(2, dtype=torch.complex128)}, path))
    assert "\x1b" not in message


# Ties.


@ZIP_AND_LEGACY
def test_tensors_that_are_one_are_tied_to_the_first_name(path, as_zip):
    weight = torch.randn(4, 3)
    state = {"embed": weight, "head": weight, "again": weight.view(4, 3), "copy": weight.clone()}
    with TorchFile(save(state, path, as_zip=as_zip)) as checkpoint:
        assert checkpoint.tied == {"head": "embed", "again": "embed"}


@ZIP_AND_LEGACY
def test_overlapping_views_and_empty_tensors_are_not_tied(path, as_zip):
    weight, nothing = torch.randn(4, 4), torch.empty(0)
    state = {"whole": weight, "t": weight.t(), "row": weight[0], "flat": weight.view(16), "e": nothing, "f": nothing}
    with TorchFile(save(state, path, as_zip=as_zip)) as checkpoint:
        assert checkpoint.tied == {}


# Memory.


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_reading_one_tensor_at_a_time_keeps_only_that_tensor_in_memory(path):
    save({f"w{i}": torch.full((1600, 1600), float(i)) for i in range(20)}, path)
    assert path.stat().st_size > 200_000_000
    script = """
import resource, sys
from pathlib import Path
import torch
from tcompress.checkpoint.torch_file import TorchFile
torch.ones(2600, 1000).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with TorchFile(Path(sys.argv[1])) as checkpoint:
    for name in checkpoint:
        assert checkpoint.read(name).sum() == 1600 * 1600 * int(name[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(run(script, path)) * 1024 < 10_240_000 + 60_000_000


def test_more_live_tensors_than_file_descriptors_are_read(path):
    base = torch.arange(400_000, dtype=torch.float32)
    save({f"w{i}": base[i : 300_000 + i] for i in range(50)}, path)
    script = """
import resource, sys
from pathlib import Path
from tcompress.checkpoint.torch_file import TorchFile
with TorchFile(Path(sys.argv[1])) as checkpoint:
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    tensors = [checkpoint.read(name) for name in checkpoint]
print(*(int(tensor[0]) for tensor in tensors))
"""
    assert run(script, path).split() == [str(i) for i in range(50)]


# Hostile and damaged files.


class Canary:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@ZIP_AND_LEGACY
def test_a_pickle_that_runs_code_is_refused_by_the_name_of_that_code(path, as_zip):
    canary = path.parent / "canary"
    save({"w": torch.ones(2), "evil": Canary(canary)}, path, as_zip=as_zip)
    refused(InputError, path, f"{os.system.__module__}.system", "never loaded")
    assert not canary.exists()


@ZIP_AND_LEGACY
def test_a_pickled_model_is_refused(path, as_zip):
    refused(
        InputError, save(torch.nn.Linear(2, 2), path, as_zip=as_zip), "torch.nn.modules.linear.Linear", "state_dict"
    )


@ZIP_AND_LEGACY
def test_bytes_that_could_double_without_end_are_refused(path, as_zip):
    refused(UnsupportedError, save({"w": torch.ones(2), "b": b"x"}, path, as_zip=as_zip), "_codecs.encode")
    refused(UnsupportedError, save({"w": torch.ones(2), "b": bytearray(b"x")}, path, as_zip=as_zip), "bytearray")


def test_a_record_that_is_smaller_than_its_tensor_is_refused(path):
    save({"first": torch.ones(2), "w": torch.ones(16)}, path)
    repack(path, replace={"data/1": bytes(20)})
    refused(InputError, path, *(["tensor w", "claims 64 bytes, its record holds 20"] if MAPS else []))


def test_a_record_that_is_missing_is_refused(path):
    save({"w": torch.ones(16)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("model/data.pkl")
    refused(InputError, zip_of(pickled, path))


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(path):
    save({"w": torch.arange(6.0).reshape(2, 3)}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("model/data.pkl")
    sizes = b"K\x02K\x03\x86"
    assert pickled.count(sizes) == 1
    refused(InputError, repack(path, replace={"data.pkl": pickled.replace(sizes, b"K\x09K\x03\x86")}))


@ZIP_AND_LEGACY
def test_a_stride_of_zero_does_not_make_terabytes(path, as_zip):
    state = {"fine": torch.ones(3, 3), "bomb": torch.zeros(1).expand(2**20, 2**20)}
    refused(SafetyError, save(state, path, as_zip=as_zip), "tensor bomb", "claims 4398046511104 bytes but stores 4")


def test_many_views_of_the_same_bytes_do_not_make_gigabytes(path):
    base = torch.zeros(100_000)
    save({f"w{i}": base[i : 90_000 + i] for i in range(300)}, path)
    refused(SafetyError, path, "claim 108000000 bytes")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(path, compression):
    save({"w": torch.zeros(1000)}, path)
    refused(InputError, repack(path, compression=compression), "compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_a_member_that_is_there_twice_is_refused(path, name):
    save({"w": torch.zeros(4)}, path)
    refused(InputError, repack(path, add=[(name, b"x")]), f"model/{name}", "twice")


def test_two_pickles_in_two_folders_are_refused(path):
    save({"w": torch.zeros(4)}, path)
    refused(InputError, repack(path, add=[("other/data.pkl", b"x")]), "2 data.pkl")


@pytest.mark.parametrize("name", ["../w", "data/../../w"])
def test_members_outside_the_archive_are_refused(path, name):
    save({"w": torch.zeros(4)}, path)
    refused(InputError, repack(path, add=[(name, b"x")]), "'..'")


def test_members_that_share_bytes_are_refused(path):
    save({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    content = bytearray(repack(path).read_bytes())
    second = content.rindex(b"model/data/1") - 46  # its entry in the list of members
    first = content.rindex(b"model/data/0") - 46
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    path.write_bytes(content)
    refused(InputError, path)


def test_a_member_larger_than_the_file_is_refused(path):
    content = bytearray(repack(save({"a": torch.zeros(4)}, path), add=[("data/last", b"x")]).read_bytes())
    entry = content.rindex(b"model/data/last") - 46
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)
    refused(InputError, path, "truncated")


def test_a_list_of_members_that_fills_the_memory_is_refused(path):
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    members = entry * 400_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, len(members), 4, 0)
    path.write_bytes(b"PK\x03\x04" + members + end)
    refused(InputError, path, "truncated or damaged")  # not for being there twice: the list was never parsed


def test_a_torchscript_archive_is_refused_by_its_name(path):
    save({"w": torch.zeros(4)}, path)
    refused(UnsupportedError, repack(path, add=[("constants.pkl", b"\x80\x02).")]), "TorchScript", "state_dict")


def test_big_endian_tensors_are_refused(path):
    save({"w": torch.zeros(4)}, path)
    refused(UnsupportedError, repack(path, replace={"byteorder": b"big"}), "big-endian")


def test_another_zip_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    refused(InputError, path, "not one that torch.save wrote")


def test_a_tar_archive_is_refused(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(UnsupportedError, path, "tar")


@ZIP_AND_LEGACY
@pytest.mark.parametrize("share", [0.001, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(path, as_zip, share):
    content = save({"w": torch.randn(40, 40), "b": torch.ones(3)}, path, as_zip=as_zip).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(InputError, path, "again")


@ZIP_AND_LEGACY
def test_a_flipped_byte_of_the_structure_is_refused_or_harmless(path, as_zip):
    content = save({"w": torch.ones(3, 4)}, path, as_zip=as_zip).read_bytes()
    for position in range(0, min(len(content), 500), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x15]) + content[position + 1 :])
        with contextlib.suppress(InputError, SafetyError), TorchFile(path) as checkpoint:
            for name in checkpoint:
                checkpoint.raw(name)


@pytest.mark.parametrize("content", [b"hello\n" * 100, bytes(2000), b"PK\x03\x04" + b"x" * 900, b"\x80\x02}q\x00."])
def test_garbage_is_refused(path, content):
    path.write_bytes(content)
    refused(InputError, path, "again")


def test_an_empty_file_is_refused(path):
    path.write_bytes(b"")
    refused(InputError, path, "is empty")


def test_only_regular_files_are_opened(path):
    os.mkfifo(path)
    refused(InputError, path, "not a regular file")
    refused(InputError, path.parent, "not a regular file")
    refused(InputError, Path("/dev/zero"), "not a regular file")
    refused(InputError, path.parent / "missing.pt", os.strerror(errno.ENOENT))


def test_a_dict_that_contains_itself_is_refused(path):
    tree = {"w": torch.ones(2)}
    tree["inner"] = {"tree": tree}
    refused(InputError, save(tree, path), "contains itself")


def test_a_dict_that_multiplies_by_sharing_is_refused(path):
    tree = {"w": torch.ones(2)}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    refused(SafetyError, save({"model": tree}, path), "200000 entries")


def test_dicts_nested_without_end_are_refused(path):
    tree = {"w": torch.ones(2)}
    for _ in range(60):
        tree = {"a": tree}
    refused(InputError, save(tree, path), "nested deeper than 50")


def test_ten_thousand_nested_lists_are_refused(path):
    pickled = b"\x80\x02}" + text("x") + b"]" * 10_000 + b"a" * 9_999 + b"s."
    refused(InputError, zip_of(pickled, path), "holds no tensors")


def test_more_opcodes_than_any_checkpoint_has_are_refused(path):
    refused(SafetyError, zip_of(b"\x80\x02" + b"\x8f" * 2_100_000 + b".", path), "2000000 opcodes")


@pytest.mark.parametrize("pickled", [b"\x80\x02", b"\x80\x02R.", b"\x80\x02K", b"\x80\x02h\x07.", b""])
def test_a_broken_pickle_is_refused(path, pickled):
    refused(InputError, zip_of(pickled, path), "again")


def test_another_pickle_protocol_is_refused(path):
    torch.save({"w": torch.ones(2)}, path, pickle_protocol=4)
    refused(UnsupportedError, path, "protocol 4")


def test_an_attribute_of_a_dict_does_not_replace_its_method(path):
    state = OrderedDict(w=torch.ones(2))
    state.ITEMS = OrderedDict
    save(state, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("model/data.pkl")
    repack(path, replace={"data.pkl": pickled.replace(b"ITEMS", b"items")})
    assert_reads(path, {"w": torch.ones(2)})


def quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def with_attribute():
    tensor = torch.ones(3)
    tensor.note = "mine"
    return tensor


@ZIP_AND_LEGACY
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "is sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "is sparse"),
        (quantized, "is quantized"),
        (with_attribute, "carries Python attributes"),
        (lambda: torch.empty(3, device="meta"), "is a meta tensor"),
        (lambda: torch.ones(3, dtype=torch.complex128), "is complex128"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "conjugate"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_tensors_of_other_kinds_are_named(path, as_zip, make, words):
    save({"fine": torch.ones(2), "odd.one": make()}, path, as_zip=as_zip)
    refused(UnsupportedError, path, "tensor odd.one", words)


@pytest.mark.skipif(not MAPS, reason="PyTorch 2.10 has the tensors in memory by then")
def test_a_file_that_shrinks_while_it_is_open_is_noticed(path):
    with TorchFile(save({"w": torch.ones(600, 600)}, path)) as checkpoint:
        os.truncate(path, 1000)
        with pytest.raises(InputError, match="changed while it was read"):
            checkpoint.read("w")


# A file of the world.


@pytest.mark.skipif(not (MODELS / "resnet20.th").exists(), reason="the shared models are not here")
def test_a_published_checkpoint_of_2018_with_cuda_tensors_reads_on_the_cpu():
    with TorchFile(MODELS / "resnet20.th") as checkpoint:
        assert checkpoint.key == "state_dict"
        assert "best_prec1" in checkpoint.other_values
        name = next(name for name in checkpoint if name.endswith("conv1.weight"))
        assert checkpoint[name].shape == (16, 3, 3, 3)
        assert checkpoint.read(name).isfinite().all()
        assert len(checkpoint.raw(name)) == checkpoint[name].nbytes
