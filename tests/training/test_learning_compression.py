"""lc: steps, multipliers and limits against the papers' equations, and what is written in the end."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import tcompress as package
from fixtures.models import DigitsMLP, held_out_images
from tcompress import compress, load_into, make_method, plan_for, verify
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.encodings import INT3, INT4
from tcompress.errors import LimitError, TaskError, UsageError
from tcompress.formats.joint import Joint
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.reshaped_sum import ReshapedSum
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker
from tcompress.runtime.install import collect
from tcompress.training.factors import as_stored
from tcompress.training.learning_compression import LearningCompression
from tcompress.training.models import Models
from tcompress.training.objective import Setup
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import Plan, Rule, Target
from tests.training.tasks import CNN, MLP, factors

WRITTEN = [
    (SVD(rank=4), None),
    (Sparse(density=0.2), torch.int8),
    (Sparse(density=0.5, m=4), torch.bfloat16),
    (LowRankSparse(rank=2, density=0.1), torch.int8),
    (ReshapedSum(rank=2), torch.bfloat16),
    (TT(rank=4), None),
    (TTMatrix(rank=2), torch.int8),
    (Tucker(rank=4), None),
]

# L(w) = 1/2 mean ||(w - w0) x||^2, on inputs that are worth more in some directions than in others.
QUADRATIC = """
import torch
from torch import nn

torch.manual_seed(0)
INPUTS = torch.randn(128, 48) @ torch.diag(torch.logspace(0, -1, 48)) @ torch.linalg.qr(torch.randn(48, 48))[0]
WEIGHT = torch.load({path!r})["0.weight"]

def model():
    return nn.Sequential(nn.Linear(48, 40, bias=False))

def train_batches():
    return [INPUTS] * 200

def loss(model, batch):
    return (model(batch) - batch @ WEIGHT.T).square().sum(1).mean() / 2

def evaluate(model):
    return -float(loss(model, INPUTS))
"""


@pytest.fixture
def run(from_dense):
    return from_dense(LearningCompression, epochs=2, out="l.safetensors")


@pytest.fixture
def prepared(small, fixtures, tmp_path):
    """Return the method's objective, of a run of four epochs, and the model that it trains."""

    def call(setting, method=None, store=None, *, text=MLP, mean_loss=None):
        (tmp_path / "task.py").write_text(text)
        method = method or LearningCompression(mu=0.5)
        task = package.load_task(str(tmp_path / "task.py"), ("model", "evaluate", "train_batches", "loss"))
        models = Models(open_checkpoint(small(setting, store)), task, "", torch.device("cpu"))
        model, _ = models.learning()
        setup = Setup(task, model, None, epochs=4, seed=0, mean_loss=mean_loss)
        method.prepare(setup, models.dense(open_checkpoint(fixtures / "digits_mlp.safetensors")))
        return method.objective(setup), model

    return call


@pytest.fixture(autouse=True)
def _short_steps(monkeypatch):
    """Let L steps be as short as the epochs of these tasks."""
    monkeypatch.setattr("tcompress.training.learning_compression._FEWEST_STEPS", 2)


def stir(objective, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for twin in objective.twins:
        twin.weight.data += 0.05 * torch.randn(twin.shape, generator=generator)
        twin.multiplier += 0.02 * torch.randn(twin.shape, generator=generator)


def weights_as_stored(model):
    with as_stored(model), torch.no_grad():
        return {name: layer.weight.clone() for name, layer in collect(model).items()}


@pytest.mark.parametrize("multipliers", [True, False])
def test_on_a_quadratic_it_goes_from_direct_compression_to_the_known_optimum(multipliers, run, tmp_path):
    torch.manual_seed(1)
    torch.save({"0.weight": 0.1 * torch.randn(40, 48)}, tmp_path / "w.pt")
    text = QUADRATIC.format(path=str(tmp_path / "w.pt"))
    method = LearningCompression(rounds=20, multipliers=multipliers)
    result = run(SVD(rank=3), method, text=text, source=tmp_path / "w.pt", lr=1e-2)
    space = {}
    exec(compile(text, "task", "exec"), space)
    inputs, weight = space["INPUTS"].double(), space["WEIGHT"].double()
    # ||(w - w0) X|| is that of (w - w0) X as a matrix, whose best part of rank 3 Eckart & Young tell.
    values = torch.linalg.svdvals(weight @ inputs.T)
    best = float(values[3:].square().sum()) / len(inputs) / 2
    direct, found = -result.rows[0].scores["score"], -result.after.scores["score"]
    assert best < 0.9 * direct
    assert best * (1 - 1e-6) <= found <= best + (0.05 if multipliers else 0.25) * (direct - best)


@pytest.mark.parametrize(("setting", "store"), [(SVD(rank=4), None), (Sparse(density=0.2), torch.int8)], ids=str)
def test_the_steps_are_those_of_the_equations(setting, store, prepared, tmp_path):
    objective, model = prepared(setting, LearningCompression(mu=0.5, growth=1.2, rounds=1), store)
    stir(objective)
    objective.begin_epoch(1, anew=True)
    objective.begin_step(0, 40)
    weights, multipliers = (
        [getattr(t, each).detach().clone() for t in objective.twins] for each in ("weight", "multiplier")
    )
    before = list(weights_as_stored(model).values())
    batch = next(
        iter(
            package.load_task(str(tmp_path / "task.py"), ("model", "evaluate", "train_batches", "loss")).train_batches()
        )
    )
    plain = (
        package.load_task(str(tmp_path / "task.py"), ("model", "evaluate", "train_batches", "loss"))
        .loss(model, batch)
        .detach()
    )
    distance = sum(
        float((w - delta - m / 0.5).square().sum()) for w, delta, m in zip(weights, before, multipliers, strict=True)
    )
    assert float(objective.loss(model, batch).detach()) == pytest.approx(float(plain) + 0.5 / 2 * distance, rel=1e-5)

    objective.begin_step(9, 40)
    assert all(torch.equal(t.multiplier, m) for t, m in zip(objective.twins, multipliers, strict=True))
    objective.begin_step(10, 40)  # the first of the second L step: a C step is due
    after = list(weights_as_stored(model).values())
    for twin, weight, old, delta in zip(objective.twins, weights, multipliers, after, strict=True):
        expected = setting.fit(weight - old / 0.5).reconstruct()
        torch.testing.assert_close(twin.factors.reconstruct(), expected, rtol=0, atol=0)
        torch.testing.assert_close(twin.multiplier, old - 0.5 * (weight - delta))
    distance = sum(
        float((w - delta - twin.multiplier / 0.6).square().sum())
        for w, delta, twin in zip(weights, after, objective.twins, strict=True)
    )
    assert float(objective.loss(model, batch).detach()) == pytest.approx(float(plain) + 0.6 / 2 * distance, rel=1e-5)


def test_without_multipliers_they_stay_zero(prepared):
    objective, _ = prepared(SVD(rank=4), LearningCompression(mu=0.5, multipliers=False))
    objective.begin_epoch(1, anew=True)
    for step in range(20):
        objective.begin_step(step, 80)
    assert not any(twin.multiplier.any() for twin in objective.twins)


def test_the_penalty_grows_as_it_is_told_and_a_thousandfold_if_it_is_not(prepared):
    told, _ = prepared(SVD(rank=4), LearningCompression(mu=1e-3, growth=1.2))
    assert [told.penalty(k, 30) for k in (0, 1, 29)] == pytest.approx([1e-3, 1.2e-3, 1e-3 * 1.2**29])
    left, _ = prepared(SVD(rank=4), LearningCompression(mu=1e-3))
    assert [left.penalty(k, 30) for k in (0, 29)] == pytest.approx([1e-3, 1.0])


def test_the_first_penalty_weighs_what_direct_compression_adds_to_the_loss(prepared):
    losses = iter([0.3, 1.5])
    objective, model = prepared(SVD(rank=4), LearningCompression(), mean_loss=lambda _: next(losses))
    distance = sum(
        float((twin.weight.detach() - delta).square().sum())
        for twin, delta in zip(objective.twins, weights_as_stored(model).values(), strict=True)
    )
    assert objective.penalty(0, 9) / 2 * distance == pytest.approx(1.5 - 0.3, rel=0.05)
    losses = iter([0.3, 0.2])  # compression is no loss: a hundredth of it is taken
    objective, _ = prepared(SVD(rank=4), LearningCompression(), mean_loss=lambda _: next(losses))
    assert objective.penalty(0, 9) / 2 * distance == pytest.approx(0.003, rel=0.05)


@pytest.mark.parametrize("store", [None, torch.int8, INT4, INT3], ids=str)
def test_the_weights_come_to_what_they_compress_to_and_is_stored(store, run, monkeypatch):
    distances = []
    plain = LearningCompression.objective

    def watched(method, setup):
        made = plain(method, setup)
        end = made.end_epoch

        def end_epoch(epoch):
            end(epoch)
            distances.append(sum(float((t.weight.detach() - t.compressed()).square().sum()) for t in made.twins) ** 0.5)

        made.end_epoch = end_epoch
        return made

    monkeypatch.setattr(LearningCompression, "objective", watched)
    run(SVD(rank=4), LearningCompression(growth=3.0, multipliers=False), epochs=8, lr=5e-2, store=store)
    assert all(after <= 1.02 * before for before, after in itertools.pairwise(distances[2:]))
    assert distances[-1] < 0.05 * distances[0]


@pytest.mark.parametrize(("setting", "store"), WRITTEN, ids=str)
def test_scores_are_those_of_what_is_written_which_starts_as_compress_has_it(setting, store, run, small, fixtures):
    result = run(setting, LearningCompression(rounds=1), store=store)
    dense = open_checkpoint(fixtures / "digits_mlp.safetensors")
    planned = small(setting, store)
    images, labels = held_out_images()
    for scores, path in ((result.rows[0].scores, planned), (result.after.scores, result.output.path)):
        assert verify(open_checkpoint(path), against=dense).problems == ()
        model = load_into(DigitsMLP(), path).eval()
        assert scores["accuracy"] == int((model(images).argmax(1) == labels).sum()) / len(labels)
    best = max(row.scores["accuracy"] for row in result.rows)
    assert result.after.scores["accuracy"] == best
    assert factors(planned).keys() == factors(result.output.path).keys()
    assert not any("was written has" in note for note in result.notes)


@pytest.mark.parametrize(
    ("setting", "method", "store"),
    [
        (ReshapedSum(rank=2), LearningCompression(alpha=2e-4, mu=0.05, until=1.0), torch.int8),
        (Sparse(density=0.2), LearningCompression(one_threshold=True), torch.int8),
        (LowRankSparse(rank=2, density=0.1), LearningCompression(growth=3.0), INT3),
    ],
    ids=["ranks are learnt", "one threshold", "few bits"],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(setting, method, store, run, monkeypatch):
    text = CNN.split("def evaluate")[0] + "def evaluate(model):\n    return float(model.bn1.num_batches_tracked)\n"
    options = {"source": "digits_cnn.safetensors", "text": text, "store": store}
    whole = run(setting, method, out="whole.safetensors", **options)
    assert whole.best_epoch == 2
    monkeypatch.setenv("DIE_HOW", "interrupt")
    measured = 0 if method.mu is not None else 10  # losses before the first step
    for die_at, save_every in ((8, 10.0), (4, 1e-9), (8, 1e-9)):
        monkeypatch.setenv("DIE_AT", str(die_at + measured))
        with pytest.raises(KeyboardInterrupt):
            run(setting, method, save_every=save_every, **options)
        monkeypatch.setenv("DIE_AT", "0")
        result = run(setting, method, save_every=save_every, **options)
        assert any(note.startswith("went on from step") for note in result.notes)
        assert result.output.sha256 == whole.output.sha256
        result.output.path.unlink()


def test_ranks_are_learnt_in_the_first_epochs_and_then_kept(run, fixtures):
    said = []
    method = LearningCompression(alpha=1e-4, mu=0.02)
    monkey = LearningCompression.objective

    def watched(self, setup):
        made = monkey(self, setup)
        end = made.end_epoch
        made.end_epoch = lambda epoch: (end(epoch), said.append([twin.setting.rank for twin in made.twins]))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearningCompression, "objective", watched)
        result = run(SVD(rank=4), method, epochs=4)
    assert said[0] != [4, 4, 4]
    assert said[1] == said[2] == said[3]
    assert result.best_epoch >= 2
    assert not result.rows[1].best
    written = open_checkpoint(result.output.path)
    ranks = {entry.shape: entry.options["rank"] for entry in view(written).manifest.layers.values()}
    assert [ranks[shape] for shape in ((128, 64), (128, 128), (10, 128))] == said[3]
    assert verify(written, against=open_checkpoint(fixtures / "digits_mlp.safetensors")).problems == ()


def test_a_higher_price_leaves_fewer_values(run):
    sizes = [
        run(ReshapedSum(rank=2), LearningCompression(alpha=alpha, mu=0.02), out=f"{alpha}.safetensors").output.nbytes
        for alpha in (3e-5, 3e-4)
    ]
    assert sizes[1] < 0.8 * sizes[0]


def test_one_threshold_keeps_the_plans_values_wherever_they_are_largest(prepared, run, fixtures):
    method = LearningCompression(mu=0.5, one_threshold=True)
    objective, _ = prepared(Sparse(density=0.1), method)
    stir(objective)
    targets = [twin.weight.detach() - twin.multiplier / 0.5 for twin in objective.twins]
    objective.begin_epoch(1, anew=True)
    objective.begin_step(0, 40)
    objective.end_epoch(1)
    count = sum(Sparse(density=0.1).kept(target.numel()) for target in targets)
    threshold = torch.cat([target.abs().reshape(-1) for target in targets]).sort(descending=True).values[count - 1]
    for twin, target in zip(objective.twins, targets, strict=True):
        assert torch.equal(twin.factors.reconstruct(), torch.where(target.abs() >= threshold, target, 0))
    result = run(Sparse(density=0.1), method, lr=1e-2)
    written = open_checkpoint(result.output.path)
    said = [math.prod(entry.shape) * entry.options["density"] for entry in view(written).manifest.layers.values()]
    assert sum(said) == pytest.approx(count)
    assert verify(written, against=open_checkpoint(fixtures / "digits_mlp.safetensors")).problems == ()


def test_frozen_layers_stay_and_dense_ones_learn(run, small):
    plan = Plan((Rule("hidden.*", SVD(rank=4)), Rule("input.*", Sparse(density=0.1)), Rule("*", None)))
    text = MLP.replace(
        "return DigitsMLP()", "made = DigitsMLP()\n    made.input.requires_grad_(False)\n    return made"
    )
    result = run(plan, text=text)
    before, after = factors(small(None, plan=plan)), factors(result.output.path)
    assert {key[0] for key in after if not torch.equal(before[key], after[key])} == {"hidden.weight"}


def test_layers_that_are_tied_learn_as_one(run):
    text = MLP.replace("DigitsMLP", "DigitsTiedMLP")
    result = run(Sparse(density=0.2), text=text, source="digits_mlp_tied.pt")
    manifest = view(open_checkpoint(result.output.path)).manifest
    assert manifest.tied == {"hidden2.weight": "hidden1.weight", "hidden2.bias": "hidden1.bias"}


def test_it_is_at_least_as_good_as_compress_alone(run):
    result = run(SVD(rank=4), LearningCompression(mu=1e6, growth=1.0))
    assert result.after.scores["accuracy"] >= result.before.scores["accuracy"]


@pytest.mark.parametrize(
    ("plan", "method", "says"),
    [
        (Joint(rank=4), LearningCompression(), r"\*: --method lc fits each layer for itself, which joint does not"),
        (Plan((Rule("*", Target(Joint, {}, keep=0.3)),)), LearningCompression(), "which joint does not"),
        (TT(rank=4), LearningCompression(alpha=1e-6), "no layer of the plan is in svd or reshaped-sum"),
        (SVD(rank=4), LearningCompression(one_threshold=True), "one_threshold is for sparse without m: no layer"),
        (Sparse(density=0.5, m=4), LearningCompression(one_threshold=True), "one_threshold is for sparse without m"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_serve_is_one_line_before_anything_begins(plan, method, says, run, tmp_path):
    with pytest.raises(UsageError, match=says):
        run(plan, method)
    assert {each.name for each in tmp_path.iterdir()} <= {"task.py", "__pycache__"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lc:mu=0", "--method lc: mu is a number above 0, got 0"),
        ("lc:mu=much", "--method lc: mu is a number above 0, got 'much'"),
        ("lc:mu=true", "mu is a number above 0, got True"),
        ("lc:mu=inf", "mu is a number above 0, got "),
        ("lc:growth=0.9", "--method lc: growth is a number of at least 1, got 0.9"),
        ("lc:alpha=-1", "--method lc: alpha is a number above 0, got -1"),
        ("lc:rounds=0", "--method lc: rounds is a number of steps in an epoch, above 0; got 0"),
        ("lc:until=2", "--method lc: until is a fraction of the epochs, above 0, to 1; got 2"),
        ("lc:multipliers=2", "--method lc: multipliers is as True, got 2"),
    ],
)
def test_senseless_options_are_refused(text, says):
    with pytest.raises(UsageError, match=says):
        make_method(text)
    assert make_method("lc:growth=1:mu=1e-3") == LearningCompression(mu=1e-3, growth=1)


def test_ranks_that_are_not_yet_learnt_are_not_written(run, tmp_path):
    with pytest.raises(LimitError, match="ended at step 1, before the method had made what may be written"):
        run(SVD(rank=4), LearningCompression(alpha=1e-5), epochs=4, steps=1)
    assert not (tmp_path / "l.safetensors").exists()


def test_a_task_that_fails_while_the_loss_is_measured_is_one_line(run):
    text = MLP.replace("    images, labels = batch\n", "    images, labels = batch\n    raise ValueError('no')\n")
    with pytest.raises(TaskError, match="batch 1, before the first step, with a batch of train_batches"):
        run(SVD(rank=4), text=text)


def test_the_models_modules_are_its_own_again_in_between(prepared):
    objective, model = prepared(SVD(rank=4))
    assert isinstance(model, nn.Module)
    inside = [layer.factors for layer in collect(model).values()]
    weights_as_stored(model)
    assert [layer.factors for layer in collect(model).values()] == inside == objective.twins


def test_it_is_a_command(tcompress, fixtures, tmp_path):
    (tmp_path / "task.py").write_text(MLP)
    words = ["finetune", fixtures / "digits_mlp.safetensors", "--task", "task.py", "--method", "lc:mu=1e-3:growth=1.2"]
    done = tcompress(
        *words, "--format", "svd", "--rank", "8", "--epochs", "2", "-o", "l.safetensors", "--device", "cpu"
    )
    assert (done.code, done.err) == (0, "")
    assert tcompress("verify", "l.safetensors", "--against", fixtures / "digits_mlp.safetensors").code == 0
    compress(
        open_checkpoint(fixtures / "digits_mlp.safetensors"), plan_for(SVD(rank=8)), out=tmp_path / "one.safetensors"
    )
    assert abs((tmp_path / "l.safetensors").stat().st_size - (tmp_path / "one.safetensors").stat().st_size) < 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("return torch.zeros(())", "loss has no gradient: no gradient reaches any factor"),
        (
            "return F.cross_entropy(model(batch[0]).detach() * model.output.bias, batch[1])",
            "loss does not touch the compressed layers: no gradient reaches any factor",
        ),
    ],
)
def test_a_loss_that_does_not_touch_the_weights_is_told_although_the_penalty_does(text, says, run, tmp_path):
    with pytest.raises(TaskError, match=says):
        run(SVD(rank=4), text=f"{MLP}\ndef loss(model, batch):\n    {text}\n")
    assert not (tmp_path / "l.safetensors").exists()
