"""Ranks that come down step by step: what EVBMF says of a layer as it is, and what becomes of its factors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tcompress import Settings, compress, load_state_dict, open_checkpoint, plan_for
from tcompress.errors import InputError, NumericalError, UsageError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tucker import Tucker
from tcompress.linalg.evbmf import evbmf_rank
from tcompress.workflow.plan import Plan, Rule
from tcompress.workflow.recompression import recompress
from tcompress.workflow.shrinking import Ladder, goals_of

SETTINGS = Settings()


def planted(rows, columns, rank, seed=0, noise=0.05):
    """Return a matrix of this rank whose singular values fall to a tenth, with noise."""
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    return left * torch.logspace(0, -1, rank) @ right + noise * torch.randn(rows, columns, generator=draw)


def convolution(out, ins, rank, seed=0):
    """Return a kernel (out, ins, 3, 3) of this rank in both channel modes, with noise."""
    draw = torch.Generator().manual_seed(seed)
    one, two = torch.randn(out, rank, generator=draw), torch.randn(ins, rank, generator=draw)
    core = torch.randn(rank, rank, 3, 3, generator=draw) * torch.logspace(0, -1, rank)[:, None, None, None]
    kernel = torch.einsum("oa,ib,abhw->oihw", one, two, core)
    return kernel + 0.05 * torch.randn(kernel.shape, generator=draw)


@pytest.fixture
def written(tmp_path):
    def call(**tensors):
        path = tmp_path / "dense.safetensors"
        save_file({f"{name}.weight": tensor.contiguous() for name, tensor in tensors.items()}, path)
        return open_checkpoint(path)

    return call


def first_and_second(dense, plan, tmp_path):
    """Return the ladder of what a plan makes of a checkpoint, and its goals with rank 1 as the least."""
    compress(dense, plan, out=tmp_path / "small.safetensors")
    kinds = {type(rule.format): rule for rule in plan.rules}
    least = SVD(rank=1, matricisation=plan.rules[0].format.matricisation) if SVD in kinds else Tucker(rank=1)
    return Ladder(open_checkpoint(tmp_path / "small.safetensors"), dense, SETTINGS), goals_of(
        dense, plan_for(least), SETTINGS
    )


@pytest.mark.parametrize(
    ("weight", "setting"),
    [
        (planted(120, 100, 12), SVD(rank=40)),
        (planted(300, 40, 5), SVD(rank=30)),
        (convolution(32, 24, 6), SVD(rank=30, matricisation="spatial")),
    ],
    ids=["wide", "tall", "spatial"],
)
def test_a_second_step_of_svd_is_the_best_for_what_the_factors_stand_for(weight, setting, written, tmp_path):
    dense = written(a=weight)
    ladder, goals = first_and_second(dense, plan_for(setting), tmp_path)
    (step,) = ladder.steps(goals, 1.0)
    whole = load_state_dict(tmp_path / "small.safetensors")["a.weight"]
    matrix = setting.matrix(whole).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert step.setting.rank == evbmf_rank(s[: setting.rank], setting.rank, setting.rank) < setting.rank
    assert step.before.rank == setting.rank
    found = ladder.fitted(step)
    r = step.setting.rank
    torch.testing.assert_close(
        (found.factors["left"] @ found.factors["right"]).double(), u[:, :r] * s[:r] @ v[:r], atol=1e-4, rtol=1e-4
    )
    rebuilt = step.setting.load(tuple(weight.shape), found.factors).reconstruct().detach()
    assert found.relative_error == pytest.approx(float((rebuilt - weight).norm() / weight.norm()), rel=1e-4)
    size = 4 * sum(setting.sizes(tuple(weight.shape)))
    assert step.saved == size * (setting.rank - r)


def test_a_second_step_of_tucker_is_that_of_the_tensor_that_the_factors_stand_for(written, tmp_path):
    weight = convolution(24, 16, 6)
    dense, setting = written(a=weight), Tucker(ranks=(18, 12))
    ladder, goals = first_and_second(dense, plan_for(setting), tmp_path)
    (step,) = ladder.steps(goals, 1.0)
    whole = load_state_dict(tmp_path / "small.safetensors")["a.weight"].double()
    modes = [whole.flatten(1), whole.movedim(1, 0).flatten(1)]
    spectra = [torch.linalg.svdvals(each) for each in modes]
    wanted = (evbmf_rank(spectra[0][:18], 18, 12 * 9), evbmf_rank(spectra[1][:12], 12, 18 * 9))
    assert step.setting.ranks == wanted < (18, 12)
    found = ladder.fitted(step)
    assert tuple(found.factors["core"].shape) == (*wanted, 9)
    best = Tucker(ranks=wanted).fit(whole.float()).reconstruct().detach()
    rebuilt = step.setting.load(tuple(weight.shape), found.factors).reconstruct().detach()
    torch.testing.assert_close(rebuilt, best, atol=1e-3, rtol=1e-3)


def test_a_step_goes_part_of_the_way_and_ends_at_the_least(written):
    dense = written(a=planted(60, 40, 5))
    (goal,) = goals_of(dense, plan_for(SVD(rank=8)), SETTINGS)
    ladder = Ladder(dense, dense, SETTINGS)
    assert [step.setting.rank for step in ladder.steps([goal], 0.6)] == [40 - 0.6 * (40 - 5)]
    assert [step.setting.rank for step in ladder.steps([goal], 1.0)] == [8]


@pytest.mark.parametrize("shape", [(300, 20), (20, 300)])
def test_tall_matrices_are_as_wide_ones(shape, written):
    weight = planted(300, 20, 5) if shape == (300, 20) else planted(300, 20, 5).T
    dense = written(a=weight)
    (step,) = Ladder(dense, dense, SETTINGS).steps(goals_of(dense, plan_for(SVD(rank=1)), SETTINGS), 1.0)
    assert step.setting.rank == 5


def test_what_is_noise_or_saves_nothing_has_no_step(written):
    noise = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    dense = written(a=noise, b=planted(10, 10, 2), c=torch.ones(1, 30))
    assert Ladder(dense, dense, SETTINGS).steps(goals_of(dense, plan_for(SVD(rank=1)), SETTINGS), 1.0) == []


def test_what_saves_most_comes_first_wherever_it_lies_in_the_file(written):
    dense = written(a=planted(30, 30, 5), b=planted(90, 80, 5), c=planted(50, 50, 5), d=planted(50, 50, 5))
    steps = Ladder(dense, dense, SETTINGS).steps(goals_of(dense, plan_for(SVD(rank=1)), SETTINGS), 1.0)
    assert [step.goal.layer.name[0] for step in steps] == ["b", "c", "d", "a"]


def test_a_flat_core_stays_or_comes_down_to_the_dense_weights_rank(written, tmp_path):
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 80, generator=draw))[0] for size in (120, 80))
    values = (0.95 ** torch.arange(80.0)).maximum(0.2 * torch.linspace(1, 0.3, 80))
    dense = written(a=left * values @ right.T)
    ladder, goals = first_and_second(dense, plan_for(SVD(rank=30)), tmp_path)
    assert evbmf_rank(values, 120, 80) == 20
    assert evbmf_rank(values[:30], 30, 30) == 0
    assert ladder.steps(goals, 0.5) == []
    assert [step.setting.rank for step in ladder.steps(goals, 0.5, towards_dense=True)] == [25]


def test_what_was_compressed_again_stands_beside_what_was_not(written, tmp_path):
    dense = written(a=planted(120, 90, 5), b=planted(90, 80, 4), c=planted(80, 80, 4))
    plan = Plan((Rule("a.*", SVD(rank=25)), Rule("b.*", SVD(rank=3))))
    compress(dense, plan, out=tmp_path / "small.safetensors")
    small = open_checkpoint(tmp_path / "small.safetensors")
    goals = [goal for goal in goals_of(dense, plan_for(SVD(rank=1)), SETTINGS) if goal.layer.name[0] in "ac"]
    ladder = Ladder(small, dense, SETTINGS)
    found = {step.goal.layer: ladder.fitted(step) for step in ladder.steps(goals, 1.0)}
    recompress(small, found, out=tmp_path / "next.safetensors")
    after = open_checkpoint(tmp_path / "next.safetensors")
    assert bytes(after.raw("b.weight.left")) == bytes(small.raw("b.weight.left"))
    assert list(after) == [f"{name}.weight.{side}" for name in "abc" for side in ("left", "right")]
    assert after["c.weight.left"].shape == (80, 4)
    assert sum(each.nbytes for each in after.values()) < sum(each.nbytes for each in small.values())


def test_a_layer_that_was_trained_dense_is_fitted_as_it_is_now(written, tmp_path):
    original, trained = planted(80, 80, 4), planted(80, 80, 4, seed=1)
    save_file({"a.weight": planted(120, 90, 5), "b.weight": trained}, tmp_path / "trained.safetensors")
    plan = plan_for(SVD(rank=5), include=["a.*"])
    compress(open_checkpoint(tmp_path / "trained.safetensors"), plan, out=tmp_path / "small.safetensors")
    dense = written(a=planted(120, 90, 5), b=original)
    ladder = Ladder(open_checkpoint(tmp_path / "small.safetensors"), dense, SETTINGS)
    (step,) = ladder.steps(goals_of(dense, plan_for(SVD(rank=1), include=["b.*"]), SETTINGS), 1.0)
    found = ladder.fitted(step)
    product = found.factors["left"] @ found.factors["right"]
    torch.testing.assert_close(product, SVD(rank=4).fit(trained).reconstruct().detach(), atol=1e-4, rtol=1e-4)
    assert found.relative_error == pytest.approx(float((product - original).norm() / original.norm()), rel=1e-4)


def test_other_formats_are_refused(written):
    dense = written(a=planted(30, 30, 5))
    with pytest.raises(UsageError, match=r"step by step in svd and tucker, and \* is to be sparse:density=0.5"):
        goals_of(dense, plan_for(Sparse(density=0.5)), SETTINGS)


def test_values_that_are_not_finite_are_named(written):
    dense = written(a=torch.full((9, 9), torch.nan))
    with pytest.raises(NumericalError, match=r"tensor a\.weight: the weight holds NaN"):
        Ladder(dense, dense, SETTINGS).steps(goals_of(dense, plan_for(SVD(rank=1)), SETTINGS), 1.0)


def test_damage_is_not_written_again_with_hashes_of_its_own(written, tmp_path):
    dense = written(a=planted(120, 90, 5), b=planted(90, 80, 4))
    ladder, goals = first_and_second(dense, plan_for(SVD(rank=25)), tmp_path)
    found = {step.goal.layer: ladder.fitted(step) for step in ladder.steps(goals, 1.0)[:1]}
    small = tmp_path / "small.safetensors"
    content = small.read_bytes()
    small.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with (
        open_checkpoint(small) as damaged,
        pytest.raises(InputError, match="its data was changed after it was written"),
    ):
        recompress(damaged, found, out=tmp_path / "next.safetensors")
    assert not (tmp_path / "next.safetensors").exists()
