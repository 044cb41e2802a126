"""Layers and blocks are matched with the dense model's: the error by hand, what learns of it, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress import load_task, make_method
from tcompress.errors import TaskError, UsageError
from tcompress.formats.svd import SVD
from tcompress.runtime.install import factorized, put
from tcompress.runtime.modules import Factorized
from tcompress.training.distillation import divergence
from tcompress.training.objective import Setup
from tcompress.training.reconstruction import Matching
from tcompress.training.schedule import cosine

INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def compressed(dense: nn.Module, rank: int = 2) -> nn.Module:
    """Return a copy of a model whose linear layers have factors, once for those that are one module."""
    student, once = copy.deepcopy(dense), dict[nn.Module, Factorized]()
    for name, layer in list(student.named_modules(remove_duplicate=False)):
        if isinstance(layer, nn.Linear):
            if layer not in once:
                setting = SVD(rank=rank)
                found = setting.fit(layer.weight.detach())
                once[layer] = factorized(layer, found, setting, like=layer.weight, cache="auto", origin=None)
            put(student, name, once[layer])
    return student.requires_grad_(True)


@dataclass
class Case:
    student: nn.Module
    teacher: nn.Module
    objective: Matching

    def loss(self, batch: object = INPUTS, step: int = 0, steps: int = 10) -> Tensor:
        self.objective.begin_step(step, steps)
        return self.objective.loss(self.student, batch)

    def error(self, step: int = 0, steps: int = 10) -> float:
        return self.loss(INPUTS, step, steps).item()

    def learning(self) -> set[str]:
        """Return the modules to whose parameters gradients came, and take those away."""
        found = {name.split(".factors")[0] for name, each in self.student.named_parameters() if each.grad is not None}
        self.student.zero_grad()
        return {name.removesuffix(".bias").removesuffix(".weight") for name in found}


@pytest.fixture
def case(tmp_path):
    """Make the objective of a model; the task gives one batch of its inputs, and does not know a loss."""

    def made(
        dense: nn.Module, method: str = "reconstruct:end_to_end=0", batch: object = INPUTS, rank: int = 2, student=None
    ) -> Case:
        torch.save(batch, tmp_path / "batch.pt")
        text = f"import torch\ndef train_batches(): return [torch.load({str(tmp_path / 'batch.pt')!r})]\n"
        (tmp_path / "task.py").write_text(text)
        made_method = make_method(method)
        task = made_method.fitted(load_task(str(tmp_path / "task.py"), (), made_method.uses))
        teacher = dense.eval().requires_grad_(False)
        student = compressed(dense, rank) if student is None else student
        objective = made_method.objective(Setup(task, student, teacher, 2, 0))
        assert isinstance(objective, Matching)
        return Case(student, teacher, objective)

    return made


def seeded(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def mlp() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


class Residual(nn.Module):
    """One of several: its output is added to its input, after changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        y = self.second(F.relu(self.norm(self.first(x)), inplace=True))
        y += x
        return y.relu_(), "no tensor"


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
            x.mul_(0.5)
        return self.head(x)


def relative(given: Tensor, answer: Tensor) -> float:
    return float(((given - answer) ** 2).sum() / (answer**2).sum())


def test_each_layer_is_compared_behind_the_compressed_ones_before_it(case):
    dense = mlp()
    found = case(dense)
    with torch.no_grad():
        errors, its, mine = [], INPUTS, INPUTS
        for at in (0, 2, 4):
            its, mine = dense[at](its), found.student[at](mine)
            errors.append(relative(mine, its))
            its, mine = its.tanh(), mine.tanh()
    assert min(errors) > 0.01
    assert found.error() == pytest.approx(sum(errors) / 3, rel=1e-5)


def test_a_layer_learns_from_its_own_error_alone(case):
    found = case(mlp())
    found.loss(INPUTS).backward()
    for at in (0, 2, 4):
        with torch.no_grad():
            before, its = found.student[:at](INPUTS), found.teacher[: at + 1](INPUTS)
        own = ((found.student[at](before) - its) ** 2).sum() / (its**2).sum() / 3
        wanted = torch.autograd.grad(own, list(found.student[at].parameters()))
        given = [each.grad for each in found.student[at].parameters()]
        for one, other in zip(wanted, given, strict=True):
            torch.testing.assert_close(other, one)


def test_no_gradient_goes_from_a_layer_to_the_one_right_before_it(case):
    found = case(seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))))
    found.loss(INPUTS).backward()
    own = ((found.student[0](INPUTS) - found.teacher[0](INPUTS)) ** 2).sum() / (found.teacher[0](INPUTS) ** 2).sum() / 2
    wanted = torch.autograd.grad(own, list(found.student[0].parameters()))
    for one, other in zip(wanted, found.student[0].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one)


def test_one_after_another_only_one_layer_learns_and_nothing_behind_it_is_computed(case):
    found = case(mlp(), "reconstruct:order=sequential:end_to_end=0.4")
    ran: list[str] = []
    for name, module in found.student.named_children():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    learnt = {}
    for step in range(10):
        ran.clear()
        found.loss(INPUTS, step, 10).backward()
        learnt[step] = (found.learning(), len(ran))
    assert [learnt[step] for step in (0, 1)] == [({"0"}, 1)] * 2
    assert [learnt[step] for step in (2, 3)] == [({"2"}, 3)] * 2
    assert [learnt[step] for step in (4, 5)] == [({"4"}, 5)] * 2
    assert all(learnt[step] == ({"0", "2", "4"}, 5) for step in range(6, 10))


def test_at_the_end_the_whole_model_learns_the_outputs(case):
    found = case(mlp(), "reconstruct:end_to_end=0.5")
    with torch.no_grad():
        wanted = relative(found.student(INPUTS), found.teacher(INPUTS))
    assert found.error(5, 10) == pytest.approx(wanted, rel=1e-5)
    assert found.error(4, 10) != pytest.approx(wanted, rel=1e-3)


def test_outputs_may_be_compared_as_logits(case):
    found = case(mlp(), "reconstruct:end_to_end=0.5:outputs=kl")
    with torch.no_grad():
        wanted = divergence(found.student(INPUTS), found.teacher(INPUTS), 3, "student-teacher")
    assert found.error(5, 10) == pytest.approx(float(wanted), rel=1e-3)
    assert found.error(4, 10) == pytest.approx(case(mlp()).error(), rel=1e-5), "layers are compared as before"


def test_the_rate_falls_to_zero_for_each_layer_anew(case):
    objective = case(mlp(), "reconstruct:order=sequential:end_to_end=0").objective
    assert [objective.rate(step, 300) for step in (0, 50, 99, 100, 150, 250)] == [
        cosine(step, 100) for step in (0, 50, 99, 0, 50, 50)
    ]


def test_what_is_learnt_is_the_best_of_that_rank_on_these_inputs(case):
    dense = seeded(lambda: nn.Linear(6, 5, bias=False))
    found = case(nn.Sequential(dense), rank=2)
    # Reduced-rank regression: the outputs X Wᵀ lose their smallest singular values, and not the weight its own.
    values = torch.linalg.svdvals(INPUTS @ dense.weight.detach().T) ** 2
    best = float(values[2:].sum() / values.sum())
    before = found.error()
    optimizer = torch.optim.LBFGS(found.student.parameters(), max_iter=500, tolerance_change=1e-12)

    def again() -> Tensor:
        optimizer.zero_grad()
        loss = found.loss(INPUTS)
        loss.backward()
        return loss

    optimizer.step(again)
    assert before > 1.02 * best
    assert found.error() == pytest.approx(best, rel=1e-3)


def test_blocks_are_the_repeated_modules_and_all_in_them_learns(case):
    found = case(seeded(Blocks), "reconstruct:by=block:end_to_end=0")
    with torch.no_grad():
        errors, its, mine = [], INPUTS, INPUTS
        for at in range(2):
            its, mine = found.teacher.blocks[at](its)[0], found.student.blocks[at](mine)[0]
            errors.append(relative(mine, its))
            its, mine = its / 2, mine / 2
        errors.append(relative(found.student.head(mine), found.teacher.head(its)))
    loss = found.loss(INPUTS)
    assert loss.item() == pytest.approx(sum(errors) / 3, rel=1e-5)
    loss.backward()
    inner = {f"blocks.{at}.{name}" for at in range(2) for name in ("first", "norm", "second")}
    assert found.learning() == {*inner, "head"}


def test_in_a_layer_that_is_changed_in_place_and_added_to_a_shortcut_its_own_output_counts(case):
    found = case(seeded(Blocks), "reconstruct:order=sequential:end_to_end=0")
    with torch.no_grad():
        hidden = [F.relu(each.norm(each.first(INPUTS))) for each in (found.student.blocks[0], found.teacher.blocks[0])]
        mine, its = found.student.blocks[0].second(hidden[0]), found.teacher.blocks[0].second(hidden[1])
    loss = found.loss(INPUTS, 1, 5)
    assert loss.item() == pytest.approx(relative(mine, its), rel=1e-5)
    loss.backward()
    assert found.learning() == {"blocks.0.second"}


@pytest.mark.parametrize(
    ("by", "units"),
    [
        ("layer", ["blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "head"]),
        ("block", ["blocks.0", "blocks.1", "head"]),
        ("blocks.1", ["blocks.0.first", "blocks.0.second", "blocks.1", "head"]),
        ("bl*.*.second", ["blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "head"]),
    ],
)
def test_units_are_in_the_order_of_their_calls(by, units, case):
    assert case(seeded(Blocks), f"reconstruct:by={by}").objective.units == units


def test_a_layer_that_is_not_called_itself_is_matched_with_what_is_around_it(case):
    def attention() -> nn.Module:
        return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5, batch_first=True)

    inputs = INPUTS.reshape(2, 8, 6)
    found = case(seeded(attention), batch=inputs)
    assert "self_attn" in found.objective.units
    found.student.train()
    assert torch.equal(found.loss(inputs), found.loss(inputs)), "nothing is dropped"


class Twice(nn.Module):
    """Calls a layer twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).tanh())


def test_all_calls_of_a_layer_count(case):
    found = case(seeded(Twice))
    with torch.no_grad():
        pairs = [(found.student.one(INPUTS), found.teacher.one(INPUTS))]
        pairs.append((found.student.one(pairs[0][0].tanh()), found.teacher.one(pairs[0][1].tanh())))
    assert found.error() == pytest.approx(sum(relative(*pair) for pair in pairs) / 2, rel=1e-5)


def test_layers_that_share_a_weight_learn_from_all_that_have_it(case):
    dense = seeded(Twice)
    dense.other = nn.Linear(6, 6)
    dense.other.weight, dense.other.bias = dense.one.weight, dense.one.bias
    student = compressed(dense)
    student.other = student.one
    assert case(dense, student=student).error() == case(seeded(Twice)).error()


def test_a_layer_that_gives_zeros_weighs_nothing_more(case):
    dense = mlp()
    for each in dense[4].parameters():
        each.data.zero_()
    assert torch.isfinite(case(dense).loss(INPUTS))


class Counted(nn.Module):
    """Calls its layer as often as it is told."""

    def __init__(self, times: int, width: int = 6) -> None:
        super().__init__()
        self.inner, self.times = nn.Linear(6, width), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            y = self.inner(x)
        return y


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> str:
        return str(self.inner(x).sum())


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        (
            lambda: Counted(1),
            lambda: Counted(2),
            r"inner is called 1 time\(s\), and in the teacher 2",
        ),
        (lambda: Counted(1), lambda: Counted(1, 5), "inner gives 16x6, and in the teacher 16x5"),
        (
            lambda: Counted(1),
            lambda: nn.Linear(6, 6),
            "the teacher has no module inner",
        ),
    ],
)
def test_a_teacher_that_is_another_model_is_refused(student, teacher, says, case):
    with pytest.raises(TaskError, match=says):
        case(seeded(teacher), student=compressed(seeded(student))).loss(INPUTS)


def test_what_gives_no_tensors_is_refused(case):
    with pytest.raises(TaskError, match="the model gives str, in which no floating tensors are found; end_to_end=0"):
        case(Told(), "reconstruct:end_to_end=1").loss(INPUTS)


@pytest.mark.parametrize(
    ("by", "says"),
    [
        (
            "decoder.*",
            r"by=decoder\.\*: no module around a compressed layer has such a name; there are blocks",
        ),
        ("bl*s", r"by=bl\*s finds blocks, which the model does not call; name what it calls"),
    ],
)
def test_blocks_that_there_are_not_are_refused(by, says, case):
    with pytest.raises(UsageError, match=says):
        case(seeded(Blocks), f"reconstruct:by={by}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("order=backwards", "order: 'backwards' is none of together, sequential"),
        ("outputs=both", "outputs: 'both' is none of squared, kl"),
        ("batches=test", "batches: 'test' is none of auto, train, calibration"),
        ("end_to_end=1.5", "end_to_end must be from 0 to 1, got 1.5"),
        ("by=3", "by is as 'layer', got 3"),
    ],
)
def test_senseless_options_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        make_method(f"reconstruct:{options}")


def test_a_note_names_what_the_model_itself_computes_with(case):
    dense = seeded(Named)
    objective = case(dense).objective
    assert objective.units == ["called"]
    assert objective.notes == ["apart stays as it is stored: what computes with it is the model itself"]
    assert case(dense, "reconstruct:end_to_end=0.5").objective.notes == []


def test_what_lies_within_a_unit_is_none(case):
    assert case(nn.Sequential(seeded(Named), nn.Linear(6, 3))).objective.units == ["0", "1"]


class Named(nn.Module):
    """Computes with a layer's weight without a call of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.apart = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.called(x), self.apart.weight)


class Chooses(nn.Module):
    """Calls one of two layers, by the sign of what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


def test_a_batch_that_calls_nothing_of_what_learns_is_refused(case):
    found = case(seeded(Chooses), batch=INPUTS.abs())
    assert found.objective.units == ["one"]
    assert found.loss(INPUTS.abs()) > 0
    with pytest.raises(
        TaskError, match="one is not called for this batch, and nothing else learns in this step; choose"
    ):
        found.loss(-INPUTS.abs())
