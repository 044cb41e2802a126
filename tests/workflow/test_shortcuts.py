"""What a layer's output is added to, and how a layer makes good what that is off by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.shortcuts import has_shortcut, meeting
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS

TASK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(self.norm(self.second(torch.relu(self.first(x)))))
        y += x
        return torch.relu(y)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block()
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        y = self.block(self.stem(x)).flatten(2).mean(dim=2)
        return self.head(y + self.mix(y))

def model():
    return Net()

def calibration_batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 6, 6, generator=random) for _ in range(3)]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    torch.manual_seed(0)
    model = load_task(str(tmp_path / "task.py"), NEEDS).model()
    model.block.norm.running_var.copy_(torch.tensor([0.1, 1.0, 4.0, 9.0]))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def both(source: Path) -> Reconstruction:
    with open_checkpoint(source) as checkpoint:
        return Reconstruction(checkpoint, load_task(str(source.with_name("task.py")), NEEDS))


@pytest.fixture
def layers(source: Path):
    """The layers, each with its weight, by name."""
    with open_checkpoint(source) as checkpoint:
        return {layer.name: (layer, checkpoint.read(layer.name).clone()) for layer in find_layers(checkpoint)}


def use_of(models, name):
    return next(use for use in models.uses if use.layer.name == name)


def before_the_last_step(model, x):
    stem, block = model.stem(x), model.block
    return block.norm(block.second(torch.relu(block.first(stem)))) + stem


def test_sums_are_found_behind_normalisations_and_dropout(both):
    found = {use.layer.name for use in both.dense.uses if has_shortcut(both.dense, use, both.batches[0])}
    assert found == {"block.second.weight", "mix.weight"}


def test_what_meets_is_in_units_of_the_output(both):
    met = meeting(both.dense, use_of(both.dense, "block.second.weight"), both.batches[0])
    model = both.dense.model
    norm = model.block.norm
    with torch.no_grad():
        stem = model.stem(both.batches[0])
        z = model.block.second(met.input)
        torch.testing.assert_close(met.input, torch.relu(model.block.first(stem)))
        together = norm(z + met.other) - norm(torch.zeros_like(z))
        torch.testing.assert_close(together, norm(z) + stem - norm(torch.zeros_like(z)))


def test_a_layer_makes_good_what_the_shortcut_is_off_by(both, layers):
    stem, weight = layers["stem.weight"]
    both.install(stem, weight * 0.7)
    second, weight = layers["block.second.weight"]

    def error(tried):
        both.install(second, tried)
        with torch.no_grad():
            was, now = (
                torch.cat([before_the_last_step(models.model, x) for x in both.batches])
                for models in (both.dense, both.prefix)
            )
        return float((was - now).norm() / was.norm())

    aim = both.aim(second, weight)
    assert error(aim.target) < 0.9 * error(weight)
    assert aim.output_error(aim.target) < aim.output_error(weight)


def test_an_untouched_prefix_asks_for_nothing(both, layers):
    for layer, weight in layers.values():
        torch.testing.assert_close(both.aim(layer, weight).target, weight, rtol=1e-3, atol=1e-4)


def test_no_module_is_left_with_a_hook(both):
    for models in (both.dense, both.prefix):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in models.model.modules())
