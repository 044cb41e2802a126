"""The commands as a person uses them: what is printed where, which files appear, which code comes back."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from tcompress.cli.app import app

COMMANDS = [
    "inspect",
    "analyze",
    "plan",
    "calibrate",
    "compress",
    "decompress",
    "verify",
    "evaluate",
    "finetune",
    "export",
    "formats",
]


def test_there_and_back_in_three_commands(tcompress, model_file):
    done = tcompress("compress", model_file, "--format", "svd", "--keep", "0.5", "-o", "small.safetensors")
    assert (done.code, done.err) == (0, "")
    assert "compressed 5 of 5 layers" in done.out
    checked = tcompress("verify", "small.safetensors", "--against", model_file)
    assert (checked.code, checked.err) == (0, "")
    assert "is what it says it is: 5 compressed layers, errors measured again" in checked.out
    back = tcompress("decompress", "small.safetensors", "-o", "dense.safetensors")
    assert (back.code, back.err) == (0, "")
    assert set(load_file("dense.safetensors")) == set(load_file(model_file))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_or_its_list(tcompress, command):
    answer = tcompress(command, "--help")
    assert answer.code == 0
    assert command == "formats" or f"Example: tcompress {command} " in answer.out


def test_no_help_text_has_words_in_brackets_that_the_terminal_would_swallow():
    door = typer.main.get_command(app)
    texts = [door.help, door.epilog]
    for command in (door, *door.commands.values()):
        texts += [command.help, command.epilog]
        texts += [
            getattr(each, said, None) for each in command.params for said in ("help", "metavar", "rich_help_panel")
        ]
    assert [text for text in texts if re.search(r"(?<!\\)\[[a-z/#@]", text or "")] == []


def test_a_file_that_became_larger_is_not_called_smaller(tcompress, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {f"{n}.weight": torch.randn(6, 6, generator=generator) for n in range(3)}
    save_file(weights, tmp_path / "tiny.safetensors")
    asked = ("compress", "tiny.safetensors", "--format", "svd:rank=1", "--dtype", "fp16")
    planned, done = tcompress(*asked, "--dry-run"), tcompress(*asked, "-o", "o.safetensors", "--report", "report.json")
    grown = (tmp_path / "o.safetensors").stat().st_size - (tmp_path / "tiny.safetensors").stat().st_size
    assert grown > 0
    why = f"{grown} bytes LARGER than its source: descriptions take more than the layers save"
    assert f"note: the output is {why}\n" in done.out
    assert f"note: the output would be {why}\n" in planned.out
    assert "x smaller" not in done.out
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == [f"the output is {why}"]


def test_an_output_of_at_most_so_many_bytes_is_not_said_to_be_larger_by_as_many(tcompress, tmp_path):
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    save_file({"fc.weight": weight}, tmp_path / "m.safetensors")
    planned = tcompress("compress", "m.safetensors", "--format", "lrs:rank=0:density=0.88", "--dry-run", "--json")
    totals, notes = (json.loads(planned.out)[key] for key in ("totals", "notes"))
    assert not totals["exact_bytes"]
    grown = totals["stored_bytes"] - totals["dense_bytes"]
    assert [note.partition(" than ")[0] for note in notes] == [f"the output may be up to {grown} bytes LARGER"]


def test_commands_work_literally_inside_a_models_folder(tcompress, model_file, tmp_path):
    assert tcompress("analyze", model_file.name).code == 0
    assert tcompress("compress", "--format", "svd", "--rank", "3").code == 0
    (made,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert made.name == f"{tmp_path.name}-tcompress"
    assert (made / "model.tcompress.safetensors").is_file()
    assert tcompress("verify", made.name).code == 0
    assert tcompress("compress", "--format", "svd", "--rank", "2", "--force").code == 0
    assert [path.name for path in made.iterdir()] == ["model.tcompress.safetensors"]


def test_json_is_one_document_with_stable_keys(tcompress, model_file):
    answer = tcompress("compress", model_file, "--format", "svd", "--rank", "3", "-o", "s.safetensors", "--json")
    document = json.loads(answer.out)
    assert list(document) == [
        "schema", "command", "tool", "dry_run", "source", "output", "plan", "layers", "totals", "repairs",
        "limits_exceeded", "other_values", "notes", "seconds", "peak_memory_bytes",
    ]  # fmt: skip
    assert document["schema"] == 1
    assert list(document["layers"][0]) == [
        "name", "kind", "shape", "dtype", "format", "options", "stored_dtype", "dense_bytes", "stored_bytes",
        "relative_error", "output_error", "seconds", "reason", "notes",
    ]  # fmt: skip
    assert list(document["source"]) == ["path", "files", "bytes", "sha256"]
    for arguments in (["inspect", model_file], ["analyze", model_file], ["verify", "s.safetensors"], ["formats"]):
        assert json.loads(tcompress(*arguments, "--json").out)["schema"] == 1
    assert json.loads(tcompress("decompress", "s.safetensors", "-o", "d.pt", "--json").out)["rebuilt"] == 5


def test_a_dry_run_writes_nothing_and_a_saved_plan_repeats_it(tcompress, model_file, tmp_path):
    before = sorted(tmp_path.iterdir())
    answer = tcompress("compress", model_file, "--format", "svd", "--keep", "0.4", "--dry-run", "--json")
    assert sorted(tmp_path.iterdir()) == before
    assert (
        tcompress("compress", model_file, "--format", "svd", "--keep", "0.4", "--dry-run", "--save-plan", "p.json").code
        == 0
    )
    assert tcompress("compress", model_file, "--plan", "p.json", "-o", "s.safetensors").code == 0
    assert json.loads(answer.out)["totals"]["stored_bytes"] == (tmp_path / "s.safetensors").stat().st_size


def test_reports_by_their_suffix(tcompress, model_file, tmp_path):
    for name in ("r.json", "r.md"):
        options = ["--format", "sparse:density=0.1", "-o", "s.safetensors", "--force", "--report", name]
        assert tcompress("compress", model_file, *options).code == 0
    assert json.loads((tmp_path / "r.json").read_text())["command"] == "compress"
    page = (tmp_path / "r.md").read_text()
    assert r"| fc.weight | linear | 64x80 | float32 | sparse:density=0.1 | 20480 |" in page
    assert tcompress("compress", model_file, "--format", "svd", "--rank", "2", "--report", "r.html").code == 2


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (["--max-error", "0.01"], "has an error of"),
        (["--max-bytes", "5kB"], "--max-bytes is 5000"),
        (["--min-ratio", "50"], "--min-ratio is 50"),
    ],
)
def test_an_exceeded_limit_exits_with_3_and_still_reports(tcompress, model_file, tmp_path, limit, said):
    options = ["--format", "svd", "--rank", "2", "-o", "s.safetensors", "--report", "r.json", *limit]
    answer = tcompress("compress", model_file, *options)
    assert answer.code == 3
    assert answer.err.count("\n") == 1
    assert said in answer.err
    assert said in json.loads((tmp_path / "r.json").read_text())["limits_exceeded"][0]


def test_the_formats_are_listed_with_options_and_papers(tcompress):
    answer = tcompress("formats")
    assert "rank, seed=0" in answer.out
    assert "Eckart & Young 1936" in answer.out
    assert "density" in answer.out


def test_inspect_shows_kinds_ties_and_the_manifest(tcompress, fixtures):
    dense = tcompress("inspect", fixtures / "digits_mlp_tied.pt").out
    assert "tied to hidden1.weight" in dense
    assert (
        tcompress("compress", fixtures / "digits_mlp_tied.pt", "--format", "svd:rank=16", "-o", "s.safetensors").code
        == 0
    )
    small = json.loads(tcompress("inspect", "s.safetensors", "--json").out)
    (row,) = [row for row in small["tensors"] if row["name"] == "hidden1.weight"]
    assert (row["format"], row["kind"]) == ("svd:rank=16", "linear")
    assert small["manifest"]["source"]["bytes"] == (fixtures / "digits_mlp_tied.pt").stat().st_size


def test_inspect_says_how_factors_are_stored(tcompress, model_file):
    options = ("--format", "lrs", "--keep", "0.3", "--dtype", "int3", "-o", "s.safetensors")
    made = tcompress("compress", model_file, *options).out.splitlines()
    shown = tcompress("inspect", "s.safetensors")
    settings = {line.split()[4] for line in made if " low-rank-sparse:" in line}
    assert settings
    assert all(f"{setting} " in shown.out for setting in settings)
    document = json.loads(tcompress("inspect", "s.safetensors", "--json").out)
    layers = [row for row in document["tensors"] if row["format"]]
    assert {row["stored_dtype"] for row in layers} == {"int3"}
    assert all(row["format"].startswith("low-rank-sparse:density=") and row["options"]["density"] for row in layers)
    tcompress("compress", model_file, "--format", "svd:rank=2", "--dtype", "bf16", "-o", "b.safetensors")
    rows = json.loads(tcompress("inspect", "b.safetensors", "--json").out)["tensors"]
    assert {row["stored_dtype"] for row in rows} == {"bf16", None}


def test_a_message_and_where_to_look_are_two_sentences(tcompress, model_file):
    for arguments in (("--kep", "0.5"), ("--threads", "0")):
        answer = tcompress("compress", model_file, *arguments)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert re.search(r"[.] See 'tcompress", answer.err)


@pytest.mark.parametrize("claim", ["COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"])
def test_what_goes_into_a_log_is_neither_folded_nor_filled_up(tcompress, tmp_path, monkeypatch, claim):
    monkeypatch.setenv(claim, "1")
    name = ".".join(["blocks", *["inner"] * 40, "weight"])
    save_file({name: torch.eye(32), "b.weight": torch.eye(2)}, tmp_path / "long.safetensors")
    done = tcompress("compress", "long.safetensors", "--format", "svd:rank=2", "-o", "s.safetensors")
    lines = done.out.splitlines()
    assert done.err == ""
    assert "\x1b" not in done.out
    assert any(line.startswith(f"{name} ") and "svd:rank=2" in line for line in lines)
    (reason,) = [line for line in lines if line.startswith("stays dense: b.weight: larger than dense")]
    assert reason.endswith("no setting is smaller")
    assert [line for line in lines if line != line.rstrip()] == []


def test_nested_checkpoints_say_what_is_not_carried_over(tcompress, fixtures):
    answer = tcompress("compress", fixtures / "digits_cnn.pt", "--format", "svd", "--rank", "4", "-o", "s.safetensors")
    assert "note: not carried over, being no tensors: epoch, accuracy" in answer.out
    assert "stays dense: conv1.weight: larger than dense at svd:rank=4: " in answer.out


USAGE = {
    "no budget": (["--format", "svd"], "how much is to be kept? give --rank, --keep or --tolerance"),
    "two budgets": (["--format", "svd", "--rank", "2", "--keep", "0.5"], "give one of --rank, --keep and --tolerance"),
    "budget twice": (["--format", "svd:rank=2", "--keep", "0.5"], "says its rank already; leave out --keep"),
    "no rank": (["--format", "sparse", "--rank", "2"], "sparse has no rank; use --keep, --tolerance or"),
    "no format": (["--rank", "2"], "--rank, --tolerance and --global go with --format"),
    "nothing asked": ([], "give --format or --plan, or --keep, --flops or --max-bytes alone"),
    "unknown format": (["--format", "magic", "--rank", "2"], "there is no format 'magic'; there are: svd, tt, "),
    "unknown option": (["--format", "svd:rang=2"], "svd: has no option rang; it has rank, seed"),
    "no such layer": (["--format", "svd", "--rank", "2", "--include", "x*"], "no layer matches x*; there are"),
    "keep of two": (["--format", "svd", "--keep", "2"], "Invalid value for '--keep'"),
    "dtype": (["--format", "svd", "--rank", "2", "--dtype", "int2"], "--dtype: 'int2' is none of bf16, fp16, fp32"),
    "device": (["--format", "svd", "--rank", "2", "--device", "abacus"], "--device: 'abacus' is none of auto, cpu"),
    "size": (["--format", "svd", "--rank", "2", "--max-bytes", "lots"], "--max-bytes: 'lots' is no size"),
    "suffix": (
        ["--format", "svd", "--rank", "2", "-o", "s.gguf"],
        "s.gguf: compressed checkpoints are safetensors files",
    ),
}


@pytest.mark.parametrize(("options", "said"), USAGE.values(), ids=USAGE.keys())
def test_a_wrong_command_line_is_one_line_with_the_way_out(tcompress, model_file, tmp_path, options, said):
    before = sorted(tmp_path.iterdir())
    answer = tcompress("compress", model_file, *options)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert said in answer.err
    assert sorted(tmp_path.iterdir()) == before


MISSED = {
    "analyze": ["--layers", "x*"],
    "compress": ["--format", "svd:rank=2", "--include", "x*"],
    "plan": ["--keep", "1", "--formats", "svd", "--explain", "x"],
}


@pytest.mark.parametrize(("command", "options"), MISSED.items(), ids=MISSED.keys())
def test_a_layer_that_is_not_there_is_told_with_some_that_are_and_how_many_more(tcompress, tmp_path, command, options):
    for count, end in ((8, "7.weight"), (11, "6.weight, 7.weight and 3 more")):
        weights = {f"{n:x}.weight": torch.eye(4) for n in range(count)}
        save_file(weights, tmp_path / "model.safetensors")
        answer = tcompress(command, "model.safetensors", *options)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert "; there are 0.weight, 1.weight, 2.weight, " in answer.err
        assert answer.err.endswith(f", {end}\n")


@pytest.mark.parametrize("command", ["inspect", "analyze", "verify", "decompress", "compress"])
def test_damaged_input_is_one_line_that_names_the_file_with_exit_code_4(tcompress, model_file, tmp_path, command):
    options = ["--format", "svd", "--rank", "2"] if command == "compress" else []
    content = model_file.read_bytes()
    for name, damaged in {"cut.safetensors": content[:-7], "noise.safetensors": bytes(99), "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(damaged)
        before = sorted(tmp_path.iterdir())
        answer = tcompress(command, name, *options)
        assert (answer.code, answer.out) == (4, "")
        assert answer.err.startswith(f"error: {name}: ")
        assert answer.err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
    answer = tcompress(command, "missing.safetensors", *options)
    assert answer.err == "error: missing.safetensors: there is no such file or folder\n"


def test_nan_has_exit_code_6_and_an_existing_output_7(tcompress, model_file, tmp_path):
    save_file({"fc.weight": torch.full((30, 30), torch.nan)}, tmp_path / "nan.safetensors")
    answer = tcompress("compress", "nan.safetensors", "--format", "svd", "--rank", "2")
    assert answer.code == 6
    assert "nan.safetensors: tensor fc.weight: holds 900 values that are NaN or Inf; --allow-nonfinite" in answer.err
    (tmp_path / "s.safetensors").touch()
    answer = tcompress("compress", model_file, "--format", "svd", "--rank", "2", "-o", "s.safetensors")
    assert answer.code == 7
    assert answer.err == "error: s.safetensors: exists already; use --force to replace it, or another -o\n"


def test_a_changed_byte_is_found_by_whoever_reads_it(tcompress, model_file, tmp_path):
    tcompress("compress", model_file, "--format", "svd", "--rank", "2", "-o", "s.safetensors")
    content = bytearray((tmp_path / "s.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "s.safetensors").write_bytes(content)
    answer = tcompress("verify", "s.safetensors")
    assert answer.code == 8
    assert "its data was changed after it was written" in answer.out
    answer = tcompress("decompress", "s.safetensors", "-o", "d.safetensors")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err == "error: s.safetensors: tensor half.weight.right: its data was changed after it was written\n"
    assert not (tmp_path / "d.safetensors").exists()


def test_control_characters_in_names_never_reach_the_terminal(tcompress, tmp_path):
    save_file({"evil\x1b[31m\n.weight": torch.randn(64, 64)}, tmp_path / "evil.safetensors")
    for arguments in (["inspect"], ["analyze"], ["compress", "--format", "svd", "--rank", "2"]):
        answer = tcompress(arguments[0], "evil.safetensors", *arguments[1:])
        assert answer.code == 0
        assert "\x1b" not in answer.out + answer.err
        assert r"evil\x1b[31m\n.weight" in answer.out


def test_a_folder_takes_its_other_files_along_and_no_other_weights(tcompress, fixtures, tmp_path):
    shutil.copytree(fixtures / "digits_mlp_sharded", tmp_path / "model")
    (tmp_path / "model" / "tokenizer").mkdir()
    (tmp_path / "model" / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"dense weights once more")
    answer = tcompress("compress", "model", "--format", "svd", "--rank", "8", "-o", "small", "--max-shard-size", "40kB")
    assert answer.code == 0
    assert "note: pytorch_model.bin was not copied" in answer.out
    made = sorted(str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*"))
    assert made == [
        "config.json",
        "model.tcompress-00001-of-00001.safetensors",
        "model.tcompress.safetensors.index.json",
        "tcompress.json",
        "tokenizer",
        "tokenizer/vocab.txt",
    ]
