"""sparse against independent truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from tcompress.errors import FormatError
from tcompress.formats.sparse import Sparse


def test_the_largest_magnitudes_stay_untouched_and_the_rest_is_zero():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    kept = Sparse(density=0.1).fit(weight).reconstruct()
    order = weight.abs().flatten().argsort(descending=True)
    assert torch.equal(kept.flatten()[order[:60]], weight.flatten()[order[:60]])
    assert not kept.flatten()[order[60:]].any()


def test_of_equal_magnitudes_the_first_are_kept():
    kept = Sparse(density=0.5).fit(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])).reconstruct()
    assert kept.tolist() == [[1, -1, 1], [0, 0, 0]]


@pytest.mark.parametrize(("density", "kept"), [(0, 0), (0.5, 6), (0.54, 6), (0.55, 7), (1, 12)])
def test_the_number_kept_is_the_density_rounded_half_up(density, kept):
    weight = torch.arange(1.0, 13).reshape(3, 4)
    assert int((Sparse(density=density).fit(weight).reconstruct() != 0).sum()) == kept


def test_a_tolerance_of_zero_keeps_just_the_values_that_are_not_zero():
    weight = torch.tensor([[0.0, 2.0, 0.0], [1e-30, 0.0, -3.0]])
    setting = Sparse.reaching(weight, 0.0)
    assert setting.kept(6) == 3
    assert torch.equal(setting.fit(weight).reconstruct(), weight)


def test_scipy_gets_the_same_matrix():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    fitted = Sparse(density=0.2).fit(weight)
    found = fitted.to_scipy()
    assert isinstance(found, sparse.csr_array)
    assert found.nnz == 54
    np.testing.assert_array_equal(found.toarray(), fitted.reconstruct().detach().reshape(6, 45).numpy())


def test_scipy_gets_bfloat16_as_float32():
    matrix = torch.tensor([[0, 1.5], [-2, 0]], dtype=torch.bfloat16)
    found = Sparse(density=1).load((2, 2), {"matrix": matrix}).to_scipy()
    assert found.dtype == np.float32
    assert found.toarray().tolist() == [[0, 1.5], [-2, 0]]


@pytest.mark.parametrize("density", [-0.1, 1.1, "half", float("nan")])
def test_a_senseless_density_is_refused(density):
    with pytest.raises(FormatError, match="sparse: density must be a fraction from 0 to 1"):
        Sparse(density=density)


def test_a_weight_in_another_memory_order_is_pruned_the_same():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    across = weight.T.contiguous().T
    assert not across.is_contiguous()
    assert torch.equal(Sparse(density=0.3).fit(across).reconstruct(), Sparse(density=0.3).fit(weight).reconstruct())


def inputs_of(samples, fan_in, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(fan_in) + torch.randn(fan_in, fan_in, generator=generator) / 4
    return torch.randn(samples, fan_in, generator=generator) @ mixing


def output_error(rest, gram):
    rest = rest.detach().double().reshape(len(rest), -1)
    return float((rest @ gram.double() * rest).sum().clamp_min(0).sqrt())


@pytest.mark.parametrize("m", [None, 4])
@pytest.mark.parametrize("shape", [(20, 24), (10, 4, 3, 2)], ids=str)
def test_for_an_output_values_are_least_squares_on_their_support(shape, m):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix, inputs = weight.reshape(len(weight), -1).numpy(), inputs_of(400, 24)
    gram = inputs.T @ inputs / 400
    found = Sparse(density=0.25, m=m).fit(weight, gram).reconstruct().detach().reshape(-1, 24)
    exact = np.zeros_like(matrix)
    for row, kept in enumerate(found.numpy() != 0):
        exact[row, kept] = np.linalg.lstsq(inputs.numpy()[:, kept], inputs.numpy() @ matrix[row], rcond=None)[0]
    best = output_error(torch.from_numpy(matrix - exact), gram)
    assert output_error(torch.from_numpy(matrix) - found, gram) == pytest.approx(best, rel=1e-3)
    assert int((found != 0).sum()) <= 0.25 * weight.numel()
    if m is not None:
        assert bool(((found != 0).reshape(-1, m).sum(1) <= 1).all())


@pytest.mark.parametrize("method", ["magnitude", "surgeon"])
@pytest.mark.parametrize("m", [None, 4])
def test_both_methods_serve_the_output_better_than_magnitude_alone(method, m):
    weight, inputs = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), inputs_of(1000, 64)
    gram = inputs.T @ inputs / 1000
    setting = Sparse(density=0.5, m=m, method=method)
    plain, found = setting.fit(weight).reconstruct(), setting.fit(weight, gram).reconstruct()
    assert torch.equal(plain, Sparse(density=0.5, m=m).fit(weight).reconstruct())
    assert output_error(weight - found, gram) < 0.9 * output_error(weight - plain, gram)
    assert int((found != 0).sum()) <= weight.numel() / 2


def test_with_inputs_apart_the_kept_values_stay_and_are_those_of_most_weight():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    power = torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.01
    kept = Sparse(density=0.1).fit(weight, power).reconstruct()
    order = (weight * power.sqrt()).abs().flatten().argsort(descending=True)
    assert torch.equal(kept.flatten()[order[:60]], weight.flatten()[order[:60]])
    assert not kept.flatten()[order[60:]].any()
    torch.testing.assert_close(Sparse(density=0.1).fit(weight, power.diag()).reconstruct(), kept)


@pytest.mark.parametrize("method", ["magnitude", "surgeon"])
def test_with_inputs_alike_the_error_is_that_of_magnitude(method):
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    found = Sparse(density=0.3, method=method).fit(weight, torch.eye(20)).reconstruct()
    torch.testing.assert_close(found, Sparse(density=0.3).fit(weight).reconstruct(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "surgeon"])
@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_few_samples_and_dead_inputs_are_no_trouble(method, density):
    weight, inputs = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)), inputs_of(8, 20)
    inputs[:, 5] = 0
    gram = inputs.T @ inputs / 8
    setting = Sparse(density=density, method=method)
    plain, found = setting.fit(weight).reconstruct(), setting.fit(weight, gram).reconstruct()
    assert found.isfinite().all()
    assert int((found != 0).sum()) <= setting.kept(600)
    assert output_error(weight - found, gram) <= output_error(weight - plain, gram) * (1 + 1e-5)


def test_an_unknown_method_is_told_with_those_there_are():
    with pytest.raises(FormatError, match="sparse: method is one of magnitude, surgeon, got 'sharp'"):
        Sparse(density=0.5, method="sharp")
