"""calibrate(): moments as counted by hand, sensitivities as differentiated by hand, and what is refused."""

from __future__ import annotations

import random
from itertools import pairwise
from textwrap import dedent

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from fixtures.models import NETWORKS, training_images
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.statistics_file import read_statistics, write_statistics
from tcompress.errors import InputError, NumericalError, OutputError, TaskError, UsageError
from tcompress.formats.svd import SVD
from tcompress.workflow import moments
from tcompress.workflow.calibration import NEEDS, USES, calibrate, calibrate_to, require_source
from tcompress.workflow.compression import compress
from tcompress.workflow.loading import load_state_dict
from tcompress.workflow.plan import plan_for
from tcompress.workflow.task import load_task

DIGITS = """
import torch
from torch import nn
from torch.nn import functional as F
from fixtures.models import NETWORKS, training_images

def model():
    return NETWORKS["{name}"]()

def calibration_batches():
    return list(training_images()[0][:40].split(16))
"""
WITH_LOSS = """
def train_batches():
    images, labels = training_images()
    return list(zip(images[:40].split(16), labels[:40].split(16)))

def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)
"""


@pytest.fixture
def task_of(tmp_path):
    def load(text):
        (tmp_path / "task.py").write_text(dedent(text))
        return load_task(str(tmp_path / "task.py"), NEEDS, USES)

    return load


@pytest.fixture
def calibrated(task_of):
    def run(text, weights, **options):
        with open_checkpoint(weights) as checkpoint:
            return calibrate(checkpoint, task_of(text), **options)

    return run


def digits(name, weights):
    """The network in float64, and its calibration images."""
    network = NETWORKS[name]()
    load_state_dict(weights, network)
    return network.eval(), training_images()[0][:40]


def patches(x, kernel, padding):
    """Every patch of every image as a row, by hand: channel, then row, then column."""
    size = x.shape[2] + 2 * padding - kernel + 1
    padded = np.zeros((*x.shape[:2], x.shape[2] + 2 * padding, x.shape[3] + 2 * padding))
    padded[:, :, padding : padding + x.shape[2], padding : padding + x.shape[3]] = x
    return np.array([
        image[:, i : i + kernel, j : j + kernel].ravel() for image in padded for i in range(size) for j in range(size)
    ])  # fmt: skip


def require_moment(layer, rows):
    assert layer.positions == len(rows)
    np.testing.assert_allclose(layer.moment.numpy(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.mean.numpy(), rows.mean(axis=0), rtol=1e-4, atol=1e-6)


def test_moments_of_linear_layers_are_those_counted_by_hand(calibrated, fixtures):
    weights = fixtures / "digits_mlp.safetensors"
    network, images = digits("digits_mlp", weights)
    found = calibrated(DIGITS.format(name="digits_mlp"), weights)
    assert (found.batches, found.sensitivity_of, found.spilled, found.untraced) == (3, "output", (), {})
    with torch.no_grad():
        first = images.flatten(1)
        second = F.relu(network.input(first))
        third = F.relu(network.hidden(second))
    for name, rows in (("input", first), ("hidden", second), ("output", third)):
        require_moment(found.layers[f"{name}.weight"], rows.double().numpy())
        assert not found.layers[f"{name}.weight"].diagonal


def test_moments_of_convolutions_are_those_of_explicit_patches(calibrated, fixtures, monkeypatch):
    monkeypatch.setattr(moments, "_PATCH_VALUES", 5000)  # a few images at a time
    weights = fixtures / "digits_cnn.safetensors"
    network, images = digits("digits_cnn", weights)
    found = calibrated(DIGITS.format(name="digits_cnn"), weights).layers
    with torch.no_grad():
        one = F.relu(network.bn1(network.conv1(images)))
        two = F.max_pool2d(F.relu(network.bn2(network.conv2(one))), 2)
        three = network.depthwise(two)
    require_moment(found["conv1.weight"], patches(images.double().numpy(), 3, 1))
    require_moment(found["conv2.weight"], patches(one.double().numpy(), 3, 1))
    require_moment(found["pointwise.weight"], patches(three.double().numpy(), 1, 0))
    groups = [patches(two[:, c : c + 1].double().numpy(), 3, 1) for c in range(32)]
    require_moment(found["depthwise.weight"], np.concatenate(groups))
    assert found["depthwise.weight"].positions == 32 * 40 * 16
    assert found["depthwise.weight"].positions_per_sample == 16
    assert found["conv1.weight"].positions_per_sample == 64


def test_uses_of_a_tied_weight_are_summed(calibrated, fixtures):
    weights = fixtures / "digits_mlp_tied.pt"
    network, images = digits("digits_mlp_tied", weights)
    found = calibrated(DIGITS.format(name="digits_mlp_tied") + WITH_LOSS, weights)
    with torch.no_grad():
        first = F.relu(network.input(images.flatten(1)))
        second = F.relu(network.hidden1(first))
    require_moment(found.layers["hidden1.weight"], torch.cat([first, second]).double().numpy())
    assert set(found.layers) == {"input.weight", "hidden1.weight", "output.weight"}
    assert found.layers["hidden1.weight"].positions_per_sample == 2


def test_sensitivities_are_the_mean_squares_of_each_samples_gradient(calibrated, fixtures):
    weights = fixtures / "digits_cnn.safetensors"
    network, images = digits("digits_cnn", weights)
    labels = training_images()[1][:40]
    found = calibrated(DIGITS.format(name="digits_cnn") + WITH_LOSS, weights)
    assert found.sensitivity_of == "loss"
    sums, positions = {}, {}
    for image, label in zip(images, labels, strict=True):
        outputs = {}
        handles = [
            module.register_forward_hook(lambda _, __, y, name=name, outputs=outputs: outputs.update({name: y}))
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        loss = F.cross_entropy(network(image[None]), label[None])
        for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            rows = gradient[0].reshape(len(gradient[0]), -1).double()
            sums[name] = sums.get(name, 0) + rows.square().sum(1)
            positions[name] = positions.get(name, 0) + rows.shape[1]
        for handle in handles:
            handle.remove()
    assert set(sums) == {name.removesuffix(".weight") for name in found.layers}
    for name, total in sums.items():
        layer = found.layers[f"{name}.weight"]
        torch.testing.assert_close(layer.sensitivity, total / positions[name], rtol=1e-3, atol=1e-12)
        assert layer.positions_per_sample == positions[name] / 40


TINY = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 3)
        self.fc = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2, bias=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, ids):
        hidden = self.act(self.fc(self.embed_tokens(ids)))
        return {"scores": self.head(hidden), "nothing": None, "more": (ids, [hidden.sum()])}

def model():
    return Tiny()

def calibration_batches():
    return [torch.tensor([[0, 1, 1], [4, 1, 0]])]
"""


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(3)
    names: dict[str, object] = {}
    exec(TINY, names)
    network = names["Tiny"]()
    save_file(network.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors", network


def test_without_labels_the_objective_is_random_signs_times_all_floating_outputs(calibrated, tiny):
    """With an activation in place, an embedding where gradients begin, and outputs deep inside a dict."""
    path, network = tiny
    found = calibrated(TINY, path)
    assert (found.sensitivity_of, found.notes) == ("output", ())
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2, 3, 2), generator=generator) * 2.0 - 1
    last = torch.randint(0, 2, (), generator=generator) * 2.0 - 1
    ids = torch.tensor([[0, 1, 1], [4, 1, 0]])
    embedded = network.embed_tokens(ids)
    before = network.fc(embedded)
    hidden = F.relu(before)
    scores = network.head(hidden)
    objective = (signs * scores).sum() + last * hidden.sum()
    wanted = torch.autograd.grad(objective, [embedded, before, scores])
    for name, gradient in zip(("embed_tokens", "fc", "head"), wanted, strict=True):
        layer = found.layers[f"{name}.weight"]
        mean = gradient.double().square().flatten(0, 1).mean(0)
        torch.testing.assert_close(layer.sensitivity, mean, rtol=1e-5, atol=1e-9)
        assert layer.positions_per_sample == 3
    embedding = found.layers["embed_tokens.weight"]
    assert (embedding.moment.tolist(), embedding.mean, embedding.positions) == ([2, 3, 0, 0, 1], None, 6)
    assert embedding.counts
    assert not embedding.diagonal


def test_moment_and_sensitivity_predict_how_far_the_output_moves(calibrated, tmp_path):
    """For one linear layer the expectation over signs is exact: sum_i s_i (E G ET)_ii is the mean square."""
    torch.manual_seed(0)
    weight, error = torch.randn(3, 4), 0.1 * torch.randn(3, 4)
    save_file({"weight": weight}, tmp_path / "one.safetensors")
    text = """
        import torch
        def model(): return torch.nn.Linear(4, 3, bias=False)
        def calibration_batches(): return [torch.randn(100, 4) for _ in range(3)]
    """
    layer = calibrated(text, tmp_path / "one.safetensors").layers["weight"]
    predicted = (layer.sensitivity * (error.double() @ layer.moment @ error.double().T).diagonal()).sum()
    torch.manual_seed(0)
    inputs = torch.cat([torch.randn(100, 4) for _ in range(3)])
    assert float(predicted) == pytest.approx(float((inputs @ error.T).square().sum(1).mean()), rel=1e-4)


def test_a_table_that_is_a_head_too_keeps_its_counts_and_says_so(calibrated, tmp_path):
    text = (
        TINY.replace("nn.Linear(4, 2, bias=False)", "nn.Linear(3, 5, bias=False)")
        .replace("self.fc = nn.Linear(3, 4)", "self.fc = nn.Linear(3, 3)")
        .replace("        self.act", "        self.head.weight = self.embed_tokens.weight\n        self.act")
    )
    names: dict[str, object] = {}
    exec(text, names)
    torch.save(names["Tiny"]().state_dict(), tmp_path / "tied.pt")
    found = calibrated(text, tmp_path / "tied.pt")
    assert found.layers["embed_tokens.weight"].counts
    assert found.notes == (
        "embed_tokens.weight is an embedding and a linear layer as well; only the embedding was looked at",
    )


def test_wide_layers_have_the_diagonal_and_large_moments_go_to_files(calibrated, fixtures):
    weights = fixtures / "digits_mlp.safetensors"
    text = DIGITS.format(name="digits_mlp")
    plain = calibrated(text, weights).layers
    diagonal = calibrated(text, weights, largest_full=64).layers
    assert [layer.diagonal for layer in diagonal.values()] == [False, True, True]
    for name, layer in diagonal.items():
        wanted = plain[name].moment.diagonal() if layer.diagonal else plain[name].moment
        torch.testing.assert_close(layer.moment, wanted, rtol=1e-5, atol=1e-7)
    spilled = calibrated(text, weights, memory_bytes=8 * (64**2 + 128**2))
    assert spilled.spilled == ("hidden.weight",)
    assert all(torch.equal(layer.moment, plain[name].moment) for name, layer in spilled.layers.items())
    assert len(calibrated(text, weights, memory_bytes=0).spilled) == 3


def test_the_same_calibration_writes_the_same_bytes_even_of_shuffled_batches(task_of, fixtures, tmp_path):
    text = (
        DIGITS.format(name="digits_mlp")
        + WITH_LOSS
        + dedent("""
        import random
        import numpy as np
        def calibration_batches():
            images = training_images()[0]
            yield images[torch.randperm(100)]
            yield images[random.sample(range(100), 10)]
            yield images[np.random.permutation(100)]
    """)
    )
    files = []
    for number in (1, 2):
        torch.rand(number), random.random(), np.random.rand(number)
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[2])
        with open_checkpoint(fixtures / "digits_mlp.safetensors") as checkpoint:
            done = calibrate_to(checkpoint, task_of(text), out=tmp_path / f"{number}.safetensors")
        files.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert files[0] == files[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[2])
    assert done.output.nbytes == len(files[1])
    assert read_statistics(tmp_path / "2.safetensors").source == done.source.sha256


def test_every_batch_and_layer_is_told_and_the_bar_is_full_in_the_end(calibrated, fixtures):
    steps = []
    calibrated(DIGITS.format(name="digits_mlp"), fixtures / "digits_mlp.safetensors", progress=steps.append)
    assert [step.layer for step in steps[:4]] == ["input.weight", "hidden.weight", "output.weight", "input.weight"]
    assert [step.task for step in steps] == ["moments"] * 10 + ["sensitivities"] * 10
    assert all(one.done_bytes <= two.done_bytes <= two.total_bytes for one, two in pairwise(steps[:10]))
    assert (steps[-1].done_bytes, steps[-1].layer) == (steps[-1].total_bytes, "")


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        (
            "def calibration_batches(): return [torch.ones(2, 64), torch.full((2, 64), torch.nan)]",
            NumericalError,
            "tensor input.weight: its input is not finite on batch 2 of calibration_batches",
        ),
        (
            "def calibration_batches(): return [torch.full((2, 64), 1e30)]",
            NumericalError,
            "tensor input.weight: the squares of its inputs are beyond float32",
        ),
        (
            "def loss(model, batch): return model(batch[0]).sum() * torch.inf",
            NumericalError,
            "weight: the gradient of its output is not finite on batch 1 of train_batches",
        ),
        (
            "def loss(model, batch): return model(batch[0]).sum().detach()",
            TaskError,
            "task.py: the gradient of batch 1 of train_batches does not reach a layer; is it detached, or no_grad?",
        ),
        ("def loss(model, batch): return model(batch[1])", TaskError, "task.py:"),
        ("def train_batches(): return []", TaskError, "task.py: train_batches gives no batch"),
        (
            "def calibration_batches(): return [torch.ones(2, 64), torch.ones(2, 3)]",
            TaskError,
            "batch 2 of calibration_batches does not fit the model: RuntimeError: mat1 and mat2",
        ),
        (
            "def model(): return nn.Embedding(9, 2)\ndef calibration_batches(): return torch.tensor([[3], [9]])",
            TaskError,
            "batch 2 of calibration_batches does not fit the model: IndexError: index out of range",
        ),
    ],
    ids=["nan", "large", "gradient", "detached", "loss", "no batches", "shape", "token"],
)
def test_what_cannot_be_measured_is_one_line_with_a_name(calibrated, fixtures, tmp_path, more, error, says):
    weights = fixtures / "digits_mlp.safetensors"
    if "Embedding" in more:
        weights = tmp_path / "table.safetensors"
        save_file({"weight": torch.ones(9, 2)}, weights)
    with pytest.raises(error) as caught:
        calibrated(DIGITS.format(name="digits_mlp") + WITH_LOSS + f"\n{more}\n", weights)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_no_gradient_reaches_are_noted(calibrated, fixtures):
    text = DIGITS.format(name="digits_mlp") + WITH_LOSS.replace("model(images)", "model.output(model.hidden(torch.relu("
        "model.input(images.flatten(1))).detach()))")  # fmt: skip
    found = calibrated(text, fixtures / "digits_mlp.safetensors")
    assert found.notes == ("no gradient reaches input.weight: its sensitivity is zero",)
    assert not found.layers["input.weight"].sensitivity.any()
    assert found.layers["hidden.weight"].sensitivity.any()


def test_compressed_checkpoints_and_strange_names_are_refused(task_of, fixtures, tmp_path):
    task = task_of(DIGITS.format(name="digits_mlp"))
    with open_checkpoint(fixtures / "digits_mlp.safetensors") as checkpoint:
        compress(checkpoint, plan_for(SVD(rank=4)), out=tmp_path / "small.safetensors")
        with pytest.raises(UsageError, match="statistics are a safetensors file; end the name with"):
            calibrate_to(checkpoint, task, out=tmp_path / "s.json")
        (tmp_path / "s.safetensors").write_bytes(b"")
        with pytest.raises(OutputError, match="exists already"):
            calibrate_to(checkpoint, task, out=tmp_path / "s.safetensors")
    with (
        open_checkpoint(tmp_path / "small.safetensors") as small,
        pytest.raises(UsageError, match="is compressed; cal"),
    ):
        calibrate(small, task)


def test_statistics_of_another_checkpoint_are_refused(calibrated, fixtures, tmp_path):
    weights = fixtures / "digits_mlp.safetensors"
    found = calibrated(DIGITS.format(name="digits_mlp"), weights)
    write_statistics(found, tmp_path / "s.safetensors")
    read = read_statistics(tmp_path / "s.safetensors")
    with open_checkpoint(weights) as checkpoint:
        require_source(read, checkpoint)
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    with open_checkpoint(tmp_path / "other.safetensors") as other, pytest.raises(InputError) as caught:
        require_source(read, other)
    assert "s.safetensors: holds statistics of another checkpoint than" in str(caught.value)
