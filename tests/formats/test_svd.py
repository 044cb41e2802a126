"""svd against independent truth."""

from __future__ import annotations

import pytest
import torch

from tcompress.errors import FormatError
from tcompress.formats.svd import SVD


def test_the_error_is_that_of_eckart_and_young():
    weight = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 5, 20, 39):
        lost = (weight - SVD(rank=rank).fit(weight).reconstruct()).double().norm()
        torch.testing.assert_close(lost, values[rank:].norm(), rtol=1e-5, atol=1e-6)


def test_both_factors_share_the_singular_values():
    weight = 1e6 * torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    factors = SVD(rank=4).fit(weight).state_dict()
    torch.testing.assert_close(factors["left"].norm(), factors["right"].norm(), rtol=1e-4, atol=0)


def test_parameters_are_those_of_the_formula():
    specs = SVD(rank=8).factor_specs((384, 1536), torch.float32)
    assert sum(spec.values for spec in specs.values()) == 8 * (384 + 1536)


def test_a_rank_above_the_dimensions_is_clipped():
    assert SVD(rank=99).factor_specs((4, 6), torch.float32)["left"].shape == (4, 4)
    assert SVD(rank=99).fit(torch.ones(4, 6)).state_dict()["left"].shape == (4, 4)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", True])
def test_a_senseless_rank_is_refused(rank):
    with pytest.raises(FormatError, match="svd: rank must be a whole number of at least 1"):
        SVD(rank=rank)


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (12, 8, 5), (12, 8, 1, 7), (6, 4, 2, 3, 2), (24, 1, 3, 3)], ids=str)
def test_the_error_of_the_spatial_matrix_is_that_of_eckart_and_young(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out, in_, height, *width = shape
    rows = [weight[o, :, h].reshape(-1) for o in range(out) for h in range(height)]  # the outputs, each row by row
    values = torch.linalg.svdvals(torch.stack(rows).double())
    for rank in (1, 3, len(values) - 1):
        found = SVD(rank=rank, matricisation="spatial").fit(weight)
        lost = (weight - found.reconstruct()).double().norm()
        torch.testing.assert_close(lost, values[rank:].norm(), rtol=1e-5, atol=1e-5)
    specs = SVD(rank=2, matricisation="spatial").factor_specs(shape, torch.float32)
    assert sum(spec.values for spec in specs.values()) == 2 * (out * height + in_ * torch.Size(width).numel())


def test_a_separable_kernel_is_one_column_after_one_row():
    column, row = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    sobel = torch.outer(column, row).reshape(1, 1, 3, 3)
    assert SVD.reaching(sobel, 1e-6, matricisation="spatial").rank == 1
    torch.testing.assert_close(SVD(rank=1, matricisation="spatial").fit(sobel).reconstruct().detach(), sobel)


def test_the_matrices_are_the_same_where_there_is_no_kernel():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    channel, spatial = (SVD(rank=3, matricisation=name).fit(weight) for name in ("channel", "spatial"))
    assert torch.equal(channel.reconstruct(), spatial.reconstruct())


@pytest.mark.parametrize("value", ["rows", "", 1, None, ["channel"]], ids=str)
def test_an_unknown_matricisation_is_told_with_those_there_are(value):
    with pytest.raises(FormatError, match="svd: matricisation is one of channel, spatial, got"):
        SVD(rank=1, matricisation=value)


def moment_of(fan_in, samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, fan_in, generator=generator, dtype=torch.float64) @ (
        torch.rand(fan_in, 1, generator=generator, dtype=torch.float64)
        * torch.randn(fan_in, fan_in, generator=generator, dtype=torch.float64)
    )
    return inputs.T @ inputs / samples


def output_error(weight, found, gram):
    rest = (weight.double() - found.reconstruct().detach().double()).reshape(len(weight), -1)
    return float((rest @ gram.double() * rest).sum().clamp_min(0).sqrt())


@pytest.mark.parametrize("shape", [(20, 16), (12, 30), (10, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_for_an_output_the_error_is_that_of_eckart_and_young_by_three_routes(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = weight.reshape(len(weight), -1).double()
    gram = moment_of(matrix.shape[1], samples=200)
    values, vectors = torch.linalg.eigh(gram)
    tails = [
        torch.linalg.svdvals(matrix @ (vectors * values.clamp_min(0).sqrt()))[rank:].norm(),
        torch.linalg.eigvalsh(matrix @ gram @ matrix.T).flip(0)[rank:].clamp_min(0).sum().sqrt(),
    ]
    lower = torch.linalg.cholesky(gram)
    left, kept, right = torch.linalg.svd(matrix @ lower, full_matrices=False)
    whitened = torch.linalg.solve_triangular(
        lower, (left[:, :rank] * kept[:rank]) @ right[:rank], upper=False, left=False
    )
    tails.append((((matrix - whitened) @ gram) * (matrix - whitened)).sum().sqrt())
    found = output_error(weight, SVD(rank=rank).fit(weight, gram), gram)
    for tail in tails:
        assert found == pytest.approx(float(tail), rel=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
def test_what_no_input_sees_costs_no_rank(shape):
    out, fan_in = shape
    generator = torch.Generator().manual_seed(0)
    seen = torch.linalg.qr(torch.randn(fan_in, 6, generator=generator))[0]
    unseen = torch.randn(out, fan_in, generator=generator) @ (torch.eye(fan_in) - seen @ seen.T)
    weight = torch.randn(out, 2, generator=generator) @ torch.randn(2, 6, generator=generator) @ seen.T + unseen
    exact = torch.linalg.qr(seen.double())[0]  # of float32, rounding would be an input in every direction
    gram = (exact * torch.rand(6, generator=generator)) @ exact.T
    plain, found = SVD(rank=2).fit(weight), SVD(rank=2).fit(weight, gram)
    assert output_error(weight, found, gram) < 1e-5 * output_error(weight, plain, gram)


@pytest.mark.parametrize("matricisation", ["channel", "spatial"])
def test_inputs_that_are_all_alike_change_nothing(matricisation):
    weight = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    setting = SVD(rank=5, matricisation=matricisation)
    for gram in (torch.eye(36), torch.ones(36)):
        expected, found = setting.fit(weight).reconstruct(), setting.fit(weight, gram).reconstruct()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_spatial_pair_serves_its_output_better():
    weight = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    gram, setting = moment_of(36, samples=100), SVD(rank=5, matricisation="spatial")
    assert output_error(weight, setting.fit(weight, gram), gram) < 0.9 * output_error(weight, setting.fit(weight), gram)
