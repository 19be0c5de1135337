"""Breadcrumbs, DELLA and SCE against cases worked by hand and their papers' promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from experts.factors import LowRank
from experts.merging.blocks import stacks, whole
from experts.merging.breadcrumbs import breadcrumb_bounds, breadcrumbs
from experts.merging.della import by_magnitude, magprune
from experts.merging.draws import Draws, survivors
from experts.merging.methods import Breadcrumbs, Della
from experts.merging.sce import energies, erase, sce, shares, variance, variance_threshold


def test_breadcrumbs_masks_the_outliers_and_the_small() -> None:
    delta = torch.tensor([0.1, -9.0, 2.0, -0.5, 3.0, 0.0, -1.0, 0.2, 0.3, 0.4])
    bounds = breadcrumb_bounds(delta, density=0.3, outliers=0.1)
    torch.testing.assert_close(
        breadcrumbs(delta, *bounds), torch.tensor([0, 0, 2.0, 0, 3.0, 0, -1.0, 0, 0, 0])
    )


def test_breadcrumbs_that_mask_nothing_change_nothing() -> None:
    delta = torch.randn(3, 4)
    bounds = breadcrumb_bounds(delta, density=1.0, outliers=0.0)
    torch.testing.assert_close(breadcrumbs(delta, *bounds), delta, rtol=0, atol=0)


@given(st.integers(0, 10_000), st.integers(2, 400), st.floats(0.05, 0.6), st.floats(0, 0.3))
@settings(max_examples=60)
def test_breadcrumbs_keeps_what_was_asked_for(seed: int, size: int, density: float, outliers: float) -> None:
    delta = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    kept = breadcrumbs(delta, *breadcrumb_bounds(delta, density, outliers))
    assert abs(int((kept != 0).sum()) - max(1, int(density * size))) <= 1
    order = delta.abs().sort(descending=True).values
    masked = int(outliers * size + 1e-6)
    assert kept.abs().max() <= order[masked]


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=60)
def test_places_by_magnitude_are_a_stable_argsort(seed: int, rows: int, columns: int) -> None:
    values = torch.randint(-4, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(by_magnitude(values), values.abs().argsort(dim=1, stable=True))


def test_magprune_drops_the_small_more_often_and_keeps_the_expectation() -> None:
    delta = torch.linspace(1, 2, 400).repeat(500, 1)
    delta = delta[:, torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    sparse = magprune(delta, 0.5, 0.6, Draws(3, "a", "w"))
    share = (sparse != 0).float().mean(0)
    order = delta[0].argsort()
    assert abs(share[order[:40]].mean() - 0.23) < 0.02
    assert abs(share[order[-40:]].mean() - 0.77) < 0.02
    torch.testing.assert_close(sparse.mean(0), delta.mean(0), rtol=0.3, atol=0)
    assert abs(float(sparse.mean() / delta.mean()) - 1) < 0.01


def test_magprune_without_width_is_dare() -> None:
    delta = torch.randn(30, 40)
    sparse = magprune(delta, 0.25, 0.0, Draws(3, "a", "w"))
    kept = sparse != 0
    torch.testing.assert_close(sparse[kept], delta[kept] / 0.75)
    assert abs(float(kept.float().mean()) - 0.75) < 0.05
    torch.testing.assert_close(magprune(delta, 0.0, 0.0, Draws(3, "a", "w")), delta, rtol=0, atol=0)


def test_draws_cover_all_steps_evenly_and_can_be_cut_by_fours() -> None:
    once = Draws(1, "a", "w").take((8, 4_000))
    assert once.min() >= 0
    assert once.max() < 65536
    assert abs(float(once.mean()) - 32767.5) < 500
    stream = Draws(1, "a", "w")
    torch.testing.assert_close(torch.cat([stream.take((4, 4_000)), stream.take((4, 4_000))]), once)


def test_a_drop_rate_just_below_one_still_keeps_some() -> None:
    kept, rescale = survivors(1 - 1e-9, torch.tensor([0.0, 65534.0, 65535.0]))
    assert kept.tolist() == [0, 0, 1]
    assert float(rescale) == 65536


def test_sce_worked_by_hand() -> None:
    deltas = torch.tensor([[4.0, 1.0, 1.0, -2.0], [0.0, 1.0, 3.0, 1.0]])
    # Variances 4, 0, 1, 2.25; two thirds of the three that are not zero stay: columns 0 and 3.
    assert variance_threshold(variance(deltas), 0.67) == 2.25
    # Energies 20 and 1. Column 0 is the first's; column 3 elects minus, the first's too.
    torch.testing.assert_close(sce(deltas, 0.67, 1.0), torch.tensor([4.0, 0, 0, -2.0]))
    # All selected: energies 22 and 11, weights 2 : 1.
    expected = torch.tensor([4.0, 1.0, (2 * 1 + 1 * 3) / 3, -2.0])
    torch.testing.assert_close(sce(deltas, 1.0, 1.0), expected)


def test_sce_of_one_task_is_that_task() -> None:
    delta = torch.randn(1, 3, 4)
    torch.testing.assert_close(sce(delta, 0.1, 1.0), delta[0])


def test_sce_selects_nothing_where_the_tasks_agree() -> None:
    same = torch.ones(3, 4)
    assert not sce(same, 0.5, 1.0).any()


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_sce_lies_between_the_task_vectors(seed: int) -> None:
    deltas = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    merged = erase(deltas, shares(energies(deltas)))
    assert bool((merged <= deltas.max(0).values.clamp(min=0) + 1e-5).all())
    assert bool((merged >= deltas.min(0).values.clamp(max=0) - 1e-5).all())


@pytest.mark.parametrize("shape", [(7,), (130, 600), (3, 5, 7), ()])
def test_blocks_cover_a_parameter_of_any_shape(shape: tuple[int, ...]) -> None:
    delta = torch.randn(shape)
    rows = [stack.clone() for _, stack in stacks([delta, None], shape)]
    torch.testing.assert_close(torch.cat([part[0] for part in rows]).reshape(shape), delta, rtol=0, atol=0)
    assert not any(part[1].any() for part in rows)
    torch.testing.assert_close(whole(delta).reshape(shape), delta, rtol=0, atol=0)


def test_blocks_multiply_products_out() -> None:
    delta = LowRank(torch.randn(150, 3), torch.randn(3, 700))
    parts: list[Tensor] = [stack[0].clone() for _, stack in stacks([delta], delta.shape)]
    assert len(parts) > 1
    torch.testing.assert_close(torch.cat(parts), delta.dense())


def test_impossible_fractions_name_the_field() -> None:
    with pytest.raises(ValidationError, match="outliers"):
        Breadcrumbs(density=0.9, outliers=0.2)
    with pytest.raises(ValidationError, match=r"epsilon must be below 0\.2"):
        Della(drop_rate=0.9, epsilon=0.5)
