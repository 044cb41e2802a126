"""The user's model, traced: which module uses which weight, and what its matrix is applied to."""

from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, TaskError
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS, calibration_inputs, input_matrix, load_traced
from tests.conftest import FIXTURES

CPU = torch.device("cpu")
DIGITS = """
import torch
from fixtures.models import NETWORKS, held_out_images

def model():
    return NETWORKS["{name}"]()

def calibration_batches():
    yield held_out_images()[0][:8]
    yield held_out_images()[0][8:12]
"""


@pytest.fixture
def traced_of(tmp_path):
    def trace(text, weights, **options):
        (tmp_path / "task.py").write_text(dedent(text))
        task = load_task(str(tmp_path / "task.py"), NEEDS)
        batches = calibration_inputs(task)
        with open_checkpoint(weights) as checkpoint:
            traced = load_traced(checkpoint, task, batches, device=CPU, **options)
        return traced, batches

    return trace


def convolutions():
    for dimensions in (1, 2, 3):
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        yield from (
            pytest.param(kind, dimensions, options, id=f"{dimensions}d-{name}")
            for name, options in {
                "plain": {},
                "stride": {"stride": 2},
                "dilation": {"dilation": 2, "padding": 2},
                "same": {"padding": "same", "dilation": 2},
                "groups": {"groups": 2, "padding": 1},
                "depthwise": {"groups": 4, "stride": 2},
                "circular": {"padding": 2, "padding_mode": "circular"},
                "replicate": {"padding": 1, "padding_mode": "replicate", "groups": 2},
                "reflect": {"padding": 1, "padding_mode": "reflect", "stride": 3},
            }.items()
        )


@pytest.mark.parametrize(("kind", "dimensions", "options"), [*convolutions()])
def test_a_convolution_is_its_matrix_times_the_rows(kind, dimensions, options):
    torch.manual_seed(0)
    layer = kind(4, 8, 3, bias=False, **options).double()
    x = torch.randn(2, 4, *(9, 8, 7)[:dimensions], dtype=torch.float64)
    wanted = layer(x)
    rows = input_matrix(layer, x).reshape(2, layer.groups, -1, layer.weight[0].numel())
    matrix = layer.weight.reshape(layer.groups, 8 // layer.groups, -1)
    found = torch.einsum("bgpn,gon->bgop", rows, matrix).reshape(wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_unequal_kernels_and_paddings_and_an_input_without_a_batch_are_respected():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1), bias=False)
    x = torch.randn(3, 9, 8)
    found = (layer.weight.reshape(5, -1) @ input_matrix(layer, x).T).reshape(layer(x).shape)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)


def test_a_linear_layer_is_applied_to_the_last_dimension():
    layer, x = nn.Linear(6, 3, bias=False), torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(input_matrix(layer, x) @ layer.weight.T, layer(x).reshape(-1, 3))


@pytest.mark.parametrize(
    ("name", "file", "order"),
    [
        ("digits_mlp", "digits_mlp.safetensors", ["input", "hidden", "output"]),
        ("digits_cnn", "digits_cnn.safetensors", ["conv1", "conv2", "depthwise", "pointwise", "fc"]),
    ],
)
def test_uses_stand_in_the_order_of_the_models_calls(traced_of, name, file, order):
    traced, batches = traced_of(DIGITS.format(name=name), FIXTURES / file)
    assert [use.layer.name for use in traced.uses] == [f"{each}.weight" for each in order]
    assert [use.module for use in traced.uses] == [getattr(traced.model, each) for each in order]
    assert not traced.model.training
    assert not traced.untraced
    assert traced.run(batches[0]).shape == (8, 10)
    assert not any(module._forward_pre_hooks for module in traced.model.modules())


def test_a_tied_weight_is_one_layer_with_two_uses(traced_of):
    traced, _ = traced_of(DIGITS.format(name="digits_mlp_tied"), FIXTURES / "digits_mlp_tied.pt")
    names = [use.layer.name for use in traced.uses]
    assert names == ["input.weight", "hidden1.weight", "hidden1.weight", "output.weight"]
    assert [use.module for use in traced.uses[1:3]] == [traced.model.hidden1, traced.model.hidden2]


ODD = """
import torch
from torch import nn

class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.late, self.never, self.own, self.early = nn.Linear(4, 2), nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4)
        self.rnn = nn.RNN(4, 4)

    def forward(self, x):
        return self.late(self.own(self.early(self.early(self.rnn(x)[0]))))

def model():
    return Odd()

def calibration_batches():
    return [torch.ones(3, 4)]
"""


def test_what_is_not_traced_says_why_and_order_is_that_of_first_calls(traced_of, tmp_path):
    names: dict[str, object] = {}
    exec(ODD, names)
    save_file(
        {f"m.{name}": tensor for name, tensor in names["model"]().state_dict().items()}, tmp_path / "o.safetensors"
    )
    traced, _ = traced_of(ODD, tmp_path / "o.safetensors", strip_prefix="m.")
    assert [use.layer.name for use in traced.uses] == ["m.early.weight", "m.late.weight"]
    assert traced.untraced == {
        "m.never.weight": "the model does not call it",
        "m.own.weight": "Own has a forward of its own",
        "m.rnn.weight_hh_l0": "weight_hh_l0 is no layer's weight",
        "m.rnn.weight_ih_l0": "weight_ih_l0 is no layer's weight",
    }


@pytest.mark.parametrize("number", [1, 2])
def test_a_batch_that_does_not_fit_is_named(traced_of, number):
    text = (
        DIGITS.format(name="digits_mlp")
        + "\n"
        + dedent(f"""
        def calibration_batches():
            return [torch.ones(2, 3 if n == {number} else 64) for n in (1, 2)]
    """)
    )

    def run_all():
        traced, batches = traced_of(text, FIXTURES / "digits_mlp.safetensors")
        return [traced.run(batch) for batch in batches]

    with pytest.raises(TaskError) as caught:
        run_all()
    assert f"batch {number} of calibration_batches does not fit the model: RuntimeError: mat1 and mat2" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_tuples_are_arguments_dicts_go_by_name_and_lists_inside_stay_lists(traced_of, tmp_path):
    text = """
        import torch
        from torch import nn

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 2)

            def forward(self, x, more):
                assert type(more) is list, type(more)
                return self.fc(x + more[0])

        def model():
            return Two()

        def calibration_batches():
            x = torch.ones(3, 4)
            return [(x, [x]), {"more": [x], "x": x}, [x, [x]]]
    """
    save_file({"fc.weight": torch.ones(2, 4), "fc.bias": torch.zeros(2)}, tmp_path / "two.safetensors")
    traced, batches = traced_of(text, tmp_path / "two.safetensors")
    assert [traced.run(batch).tolist() for batch in batches] == [[[8.0, 8.0]] * 3] * 3


def test_no_batches_and_another_models_weights_are_refused(traced_of):
    text = DIGITS.format(name="digits_mlp")
    with pytest.raises(TaskError, match="calibration_batches gives no batch"):
        traced_of(text + "\ndef calibration_batches(): return []\n", FIXTURES / "digits_mlp.safetensors")
    with pytest.raises(InputError, match="does not fit the model DigitsMLP; missing: "):
        traced_of(text, FIXTURES / "digits_cnn.safetensors")
