"""The rooms and who may import whom, read from the source; the message says why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tcompress"

# A room may import the rooms named for it, itself, and errors.
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "linalg": set(),
    "encodings": set(),
    "checkpoint": set(),
    "formats": {"linalg", "encodings"},
    "runtime": {"formats", "encodings"},
    "workflow": {"runtime", "formats", "linalg", "encodings", "checkpoint"},
    "training": {"workflow", "runtime", "formats", "linalg", "encodings", "checkpoint"},
    "report": {"training", "workflow", "formats"},
    "transformers": {"workflow", "runtime", "checkpoint"},
    "cli": {"report", "training", "workflow", "formats", "checkpoint"},
}
REASONS = {
    ("formats", "checkpoint"): "formats know tensors only, pass the tensor in",
    ("checkpoint", "formats"): "checkpoint deals in names and bytes; only workflow sees both",
    ("linalg", "formats"): "kernels know no formats",
    ("workflow", "cli"): "the command line is a door to the workflow, never the other way round",
}
ONLY_THERE = {
    "accelerate": {"training"},
    "matplotlib": {"report"},
    "typer": {"cli"},
    "rich": {"cli", "report"},
    "safetensors": {"checkpoint"},
    "transformers": {"transformers"},
    "scipy": {"encodings", "formats"},
    "xxhash": {"checkpoint"},
    "tensorly": {"formats", "linalg"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(path: Path, text: str) -> list[str]:
    room, problems = room_of(path), []
    where = path.relative_to(PACKAGE)
    for name in imports(ast.parse(text)):
        top, *rest = name.split(".")
        if top in ONLY_THERE and room not in ONLY_THERE[top]:
            problems.append(f"{where} imports {top}, which belongs in {sorted(ONLY_THERE[top])}")
        if top == "tcompress" and rest and rest[0] in MAY_IMPORT:
            target = rest[0]
            if target not in MAY_IMPORT.get(room, set(MAY_IMPORT)) | {room, "errors", "version"}:
                reason = REASONS.get((room, target), f"{room} may import {sorted(MAY_IMPORT[room]) or 'nothing'}")
                problems.append(f"{where} imports {target}: {reason}")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_room_imports_only_the_rooms_to_its_right(path):
    assert violations(path, path.read_text()) == []


def test_a_wrong_import_is_told_with_its_reason():
    path = PACKAGE / "formats" / "svd.py"
    assert violations(path, "from tcompress.checkpoint.reader import Checkpoint") == [
        "formats/svd.py imports checkpoint: formats know tensors only, pass the tensor in"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_inside_functions_stand_only_in_the_command_line(path):
    if room_of(path) == "cli":
        return
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = [node for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert inside == []


def test_there_is_no_import_cycle():
    graph = {}
    for path in FILES:
        module = ".".join(("tcompress", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        graph[module] = {name.rsplit(".", 1)[0] for name in imports(ast.parse(path.read_text()))} | set(
            imports(ast.parse(path.read_text()))
        )
    visiting: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in visiting, f"import cycle: {' -> '.join([*visiting, module])}"
        if module in done or module not in graph:
            return
        visiting.append(module)
        for target in sorted(graph[module] - {module}):
            visit(target)
        done.add(visiting.pop())

    for module in graph:
        visit(module)
