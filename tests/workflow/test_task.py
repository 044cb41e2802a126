"""Task files: what a user's file must hold, and that whatever it does wrong is one line with its place."""

from __future__ import annotations

import pickle
import sys
from textwrap import dedent

import pytest
import torch

from tcompress.errors import InputError, Stopped, TaskError, UsageError
from tcompress.workflow.task import load_task

NEEDS = ("model", "evaluate")
GOOD = """
import torch

def model():
    return torch.nn.Linear(2, 2)

def evaluate(model):
    return 0.5
"""


@pytest.fixture
def task_file(tmp_path):
    def write(text, name="task.py"):
        (tmp_path / name).write_text(dedent(text))
        return str(tmp_path / name)

    return write


def refusal(kind, spec, needs=NEEDS, uses=()):
    with pytest.raises(kind) as caught:
        load_task(spec, needs, uses)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def failure(task_file, body, call=lambda task: task.evaluate(None)):
    """What is said of a task whose evaluate has this body."""
    spec = task_file(f"def evaluate(model):\n    {body}\n")
    with pytest.raises(TaskError) as caught:
        call(load_task(spec, ["evaluate"]))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(spec)


def test_a_file_with_functions_is_a_task(task_file):
    task = load_task(task_file(GOOD), NEEDS)
    assert isinstance(task.model(), torch.nn.Linear)
    assert task.evaluate(task.model()) == {"score": 0.5}
    assert not task.has("example_inputs")


@pytest.mark.parametrize(
    "holder",
    [
        "class Digits:\n    def model(self): return 1\n    def evaluate(self, model): return 2\n",
        "class Kind:\n    def model(self): return 1\n    def evaluate(self, model): return 2\nDigits = Kind()\n",
        "import types\nDigits = types.SimpleNamespace(model=lambda: 1, evaluate=lambda model: 2)\n",
        "class Digits:\n    model = staticmethod(lambda: 1)\n    evaluate = staticmethod(lambda model: 2)\n",
    ],
    ids=["class", "instance", "namespace", "static"],
)
def test_a_name_behind_the_file_is_an_object_that_has_the_functions(task_file, holder):
    assert load_task(task_file(holder) + ":Digits", NEEDS).evaluate(None) == {"score": 2.0}


def test_all_missing_functions_are_named_at_once_with_their_signatures(task_file):
    spec = task_file("")
    assert refusal(UsageError, spec) == (
        f"{spec}: has no function model; write: def model() -> torch.nn.Module; and "
        "has no function evaluate; write: def evaluate(model) -> float | dict[str, float]"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def evaluate(): ...", "its evaluate cannot be called with 1 argument(s); write: def evaluate(model)"),
        ("def evaluate(model, data): ...", "cannot be called with 1 argument(s)"),
        ("def evaluate(model, *, data): ...", "cannot be called with 1 argument(s)"),
        ("evaluate = 3", "its evaluate is no function but int; write: def evaluate(model)"),
    ],
)
def test_a_function_that_cannot_be_called_as_it_will_be_is_refused(task_file, text, says):
    assert says in refusal(UsageError, task_file(text), ["evaluate"])
    assert says in refusal(UsageError, task_file(text), [], ["evaluate"])


def test_defaults_and_further_arguments_are_the_users_own(task_file):
    for text in ("def evaluate(model, data=1): return 1", "def evaluate(*all): return 1"):
        assert load_task(task_file(text), ["evaluate"]).evaluate(None) == {"score": 1.0}


def test_functions_that_nobody_asks_for_are_not_looked_at(task_file):
    assert load_task(task_file(GOOD + "\nloss = 3\n"), NEEDS).evaluate(None) == {"score": 0.5}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("none.py", "none.py: there is no such task file"),
        ("none.py:Digits", "none.py: there is no such task file"),
        ("task.txt", "task.txt: is no task file: a task is a Python file whose name ends with .py"),
        ("task.py:a-b", "task.py:a-b: 'a-b' names no object; write task.py, or task.py:name"),
        ("folder.py", "folder.py: is no file"),
        ("task.py:Digits", "task.py: has no object Digits; it has evaluate, model, torch"),
        ("", ".: is no task file: a task is a Python file whose name ends with .py"),
    ],
)
def test_a_task_that_is_not_there_is_told(task_file, tmp_path, monkeypatch, spec, says):
    monkeypatch.chdir(tmp_path)
    task_file(GOOD)
    (tmp_path / "folder.py").mkdir()
    assert refusal(UsageError, spec) == says


@pytest.mark.parametrize("text", ["x = 1\nimport (\n", "x = 1\n   y = 2\n", "x = 1\n\x00"])
def test_an_error_of_syntax_is_told_with_its_line(task_file, text):
    spec = task_file(text)
    said = refusal(UsageError, spec)
    assert said.startswith((f"{spec}:2: is no Python: ", f"{spec}: is no Python: source code string"))


def test_a_class_that_wants_arguments_is_refused(task_file):
    spec = task_file("class Digits:\n    def __init__(self, size): ...\n") + ":Digits"
    assert refusal(UsageError, spec) == f"{spec}: is a class that cannot be made without arguments"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\nimport no_such_package\n", ":2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("\n\n\n1 / 0\n", ":4: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('bye')\n", ":2: SystemExit: bye"),
        ("def f():\n    raise ValueError\nf()\n", ":2: ValueError"),
        ("import json\njson.loads('{')\n", ":2: JSONDecodeError: Expecting property name"),
    ],
)
def test_an_exception_while_the_file_runs_is_a_line_with_its_place(task_file, text, says):
    spec = task_file(text)
    assert refusal(TaskError, spec).startswith(spec + says)


def test_control_characters_and_lines_of_a_message_are_shown_on_one_line(task_file):
    assert failure(task_file, r"raise ValueError('a\n\x1b[31mb\n  c')") == r":2: ValueError: a \x1b[31mb c"


def test_a_long_message_is_cut(task_file):
    assert failure(task_file, "raise ValueError('x' * 9000)") == f":2: ValueError: {'x' * 1000}..."


def test_an_error_that_cannot_be_shown_is_told_by_its_type(task_file):
    body = "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})"
    assert failure(task_file, body) == ":2: Odd"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("float('nan')", ": evaluate gives nan as score; scores must be finite numbers"),
        ("{'a': 1.0, 'b': float('-inf')}", ": evaluate gives -inf as b; scores must be finite numbers"),
        ("None", ": evaluate gives NoneType; it must give a number"),
        ("True", ": evaluate gives bool; it must give a number"),
        ("'0.5'", ": evaluate gives str; it must give a number"),
        ("{}", ": evaluate gives dict; it must give a number, or a dict of numbers by their names"),
        ("{1: 2.0}", ": evaluate gives dict; it must give a number, or a dict of numbers by their names"),
        ("{'a': [1]}", ": evaluate(model)['a'] gives list; it must give a number"),
        ("__import__('torch').ones(3)", ": evaluate gives Tensor of shape (3,); it must give a number"),
    ],
)
def test_scores_that_are_no_finite_numbers_are_refused(task_file, given, says):
    assert failure(task_file, f"return {given}") == says


@pytest.mark.parametrize("given", ["2", "2.0", "torch.tensor(2)", "torch.tensor([2.0])", "numpy.float32(2)"])
def test_a_number_of_any_library_is_a_score(task_file, given):
    spec = task_file(f"import numpy, torch\ndef evaluate(model): return {given}\n")
    (score,) = load_task(spec, ["evaluate"]).evaluate(None).values()
    assert (type(score), score) == (float, 2.0)


def test_what_is_no_model_and_no_loss_is_refused(task_file):
    task = load_task(task_file("def model(): return 3\ndef loss(model, batch): return 1.0\n"), ["model", "loss"])
    with pytest.raises(TaskError, match=r"model gives int; it must give a torch\.nn\.Module"):
        task.model()
    with pytest.raises(TaskError, match="loss gives float; it must give a tensor of one floating value"):
        task.loss(None, None)


def test_batches_come_one_by_one_and_their_errors_have_a_place(task_file):
    text = "def train_batches():\n    yield 1\n    yield 2\n    raise OSError('gone')\n"
    spec = task_file(text + "def calibration_batches(): return 3\n")
    task = load_task(spec, ["train_batches", "calibration_batches"])
    batches = task.train_batches()
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(TaskError, match=r"task\.py:4: OSError: gone"):
        next(batches)
    with pytest.raises(TaskError, match="calibration_batches gives int; it must give something to iterate over"):
        next(task.calibration_batches())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stopped, InputError])
def test_interruptions_and_errors_of_this_package_pass(task_file, kind):
    module = kind.__module__
    spec = task_file(f"def evaluate(model):\n    import {module}\n    raise {module}.{kind.__name__}('why')\n")
    with pytest.raises(kind):
        load_task(spec, ["evaluate"]).evaluate(None)


def test_the_folder_of_the_file_can_be_imported_from_and_stays_clean(task_file, tmp_path, monkeypatch):
    task_file("VALUE = 4\n", "helper_of_a_task.py")
    task_file("VALUE = 5\n", "late_helper_of_a_task.py")
    text = """
        from helper_of_a_task import VALUE
        def evaluate(model):
            import late_helper_of_a_task
            return VALUE + late_helper_of_a_task.VALUE
    """
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = list(sys.path)
    assert load_task(task_file(text), ["evaluate"]).evaluate(None) == {"score": 9.0}
    assert sys.path == before
    assert not sys.dont_write_bytecode
    assert not (tmp_path / "__pycache__").exists()


def test_classes_of_the_file_can_be_dataclasses_and_pickled(task_file):
    text = """
        from __future__ import annotations
        import dataclasses
        @dataclasses.dataclass
        class Point:
            x: int
        def calibration_batches():
            yield Point(3)
    """
    (point,) = load_task(task_file(text), ["calibration_batches"]).calibration_batches()
    assert pickle.loads(pickle.dumps(point)) == point
    assert "task" not in sys.modules


def test_what_the_code_prints_goes_to_stderr(task_file, capsys):
    spec = task_file("print('loading')\ndef evaluate(model):\n    print('working')\n    return 1\n")
    load_task(spec, ["evaluate"]).evaluate(None)
    assert capsys.readouterr() == ("", "loading\nworking\n")
