"""The default data-free score: neutral variation is discounted, and readings vote."""

import pytest
import torch
from torch.nn import functional

from experts.routing import FeatureSpec
from experts.routing.contrast import Contrast, peculiar, voted, whitened
from experts.routing.features import Pooling

HIDDEN = 16


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_whitened_rows_give_the_energy_within_the_whitened_span():
    rows, neutral = draws(2, 1, 3, HIDDEN), draws(400, HIDDEN, seed=1) * torch.linspace(0.1, 4, HIDDEN)
    found = whitened(rows, neutral)
    covariance = neutral.T @ neutral / 400
    covariance += covariance.diagonal().mean() * torch.eye(HIDDEN)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.rsqrt()) @ vectors.T
    state = draws(HIDDEN, seed=2)
    for expert in range(2):
        span = torch.linalg.qr((rows[expert, 0] @ root).T)[0]
        wanted = (span.T @ (root @ state)).square().sum()
        assert torch.allclose((found[3 * expert : 3 * expert + 3] @ state).square().sum(), wanted, rtol=1e-3)


def test_whitened_rows_depend_on_the_span_alone():
    rows, neutral, state = draws(1, 1, 3, HIDDEN), draws(50, HIDDEN, seed=1), draws(HIDDEN, seed=2)
    mixed = draws(3, 3, seed=3) @ rows
    energies = [(whitened(each, neutral) @ state).square().sum() for each in (rows, mixed)]
    assert torch.allclose(*energies, rtol=1e-3)


def test_rows_of_zeros_stay_zeros():
    rows = draws(1, 1, 4, HIDDEN)
    rows[:, :, 2:] = 0
    assert torch.isfinite(whitened(rows, draws(9, HIDDEN, seed=1))).all()
    assert torch.equal(whitened(torch.zeros_like(rows), draws(9, HIDDEN, seed=1)), torch.zeros(4, HIDDEN))


@pytest.mark.parametrize(("pooling", "parts"), [("mean", 1), ("last", 1), ("mean_last", 2)])
def test_every_part_of_a_feature_is_read_in_every_layer(pooling: Pooling, parts: int):
    spec = FeatureSpec(layer=3, taps=(1, 2), pooling=pooling)
    rows = functional.normalize(draws(2, 3, 2, 4, HIDDEN), dim=-1)
    background = draws(40, spec.size(HIDDEN), seed=1)
    contrast = Contrast.of(rows, background, 2, spec)
    found = contrast.readings(background[:5], torch.tensor([0, 1, 0, 1, 0]))
    assert found.shape == (5, 2, 2 * parts * 3 * 2)
    assert torch.allclose(found.sum(1), torch.zeros(5, 2 * parts * 6), atol=1e-4)


def test_an_expert_without_rows_in_a_group_has_no_voice_there_and_changes_nobody_elses():
    spec = FeatureSpec(layer=1, pooling="last")
    rows = draws(3, 1, 2, 4, HIDDEN)
    rows[2, :, 1] = 0
    features, form = draws(30, HIDDEN, seed=1), torch.zeros(30, dtype=torch.long)
    found = Contrast.of(rows, features, 1, spec).readings(features, form)
    without = Contrast.of(rows[:2], features, 1, spec).readings(features, form)
    assert torch.equal(found[:, 2, 1], torch.zeros(30))
    assert torch.allclose(found[:, :2, 1], without[:, :, 1], atol=1e-5)


def test_one_loud_reading_does_not_outvote_the_others():
    found = torch.tensor([[[100.0, 0.0, 0.0], [0.0, 3.0, 3.0]]])
    shares = voted(found, torch.zeros(1, 2, 3), torch.ones(1, 2, 3)).exp()
    assert shares[0, 1] > shares[0, 0]
    assert float(shares.sum()) < 1


def tilted(experts: int, tilt: float, hidden: int = 256) -> torch.Tensor:
    """(experts, 1, 1, 4, hidden) orthonormal rows of spans that are one up to a small tilt of each."""
    start = draws(4, hidden, seed=7)
    spans = [torch.linalg.qr((start + tilt * draws(4, hidden, seed=20 + i)).T)[0].T for i in range(experts)]
    return torch.stack(spans)[:, None, None]


@pytest.mark.parametrize(("experts", "hidden"), [(3, 256), (12, 16)], ids=["fewer rows", "more rows"])
def test_what_spans_of_one_start_have_in_common_is_taken_off(experts: int, hidden: int):
    units = tilted(experts, 0.1, hidden)
    own = peculiar(units)
    common = torch.linalg.svd(units.flatten(0, 3))[2][:4]
    assert float((own @ common.T).abs().max()) < 1e-4
    assert 0 < float(own.square().sum()) < 0.1 * float(units.square().sum())


def test_spans_of_unlike_starts_and_one_expert_alone_stay_whole():
    for units in (tilted(3, 100.0), tilted(1, 0.1)):
        assert torch.equal(peculiar(units), units)


def test_experts_of_one_span_have_nothing_of_their_own():
    units = tilted(1, 0.0).repeat(2, 1, 1, 1, 1)
    assert torch.equal(peculiar(units), torch.zeros_like(units))


def test_experts_of_one_start_are_told_apart_by_their_tilts():
    spec = FeatureSpec(layer=1, pooling="mean")
    start, tilts = draws(4, 256, seed=7), draws(3, 256, seed=8)
    rows = torch.stack([torch.linalg.qr((start + 0.3 * tilt).T)[0].T for tilt in tilts])[:, None, None]
    background = draws(300, 256, seed=9)
    features = background[:60] + 0.8 * tilts.repeat_interleave(20, 0)
    contrast = Contrast.of(rows, background, 1, spec)
    levels, found = (
        contrast.readings(each, torch.zeros(len(each), dtype=torch.long)) for each in (background, features)
    )
    scores = (found - levels.mean(0)) / levels.std(0)
    right = (scores.argmax(1) == torch.arange(3).repeat_interleave(20)[:, None]).float().mean(0)
    assert float(right[1]) > 0.9
    assert float(right[1]) >= float(right[0])
