"""What rounding does to router features is learnt from neutral prompts and taken back."""

from types import SimpleNamespace

import torch
from torch import Tensor

from service.engine.correction import Correction
from service.engine.model import Batch, Forward
from service.gating.bank import GatePlan

WIDTH = 24


def features(count: int, seed: int) -> Tensor:
    """Prompts of one form or the other: a huge shared state, thinned out by a prompt's length, and their own."""
    generator = torch.Generator().manual_seed(seed)
    thinned = 300 * torch.rand(count, 1, generator=generator) * torch.eye(WIDTH)[0]
    form = 100 * (torch.arange(count) % 2)[:, None] * torch.eye(WIDTH)[1]
    return thinned + form + torch.randn(count, WIDTH, generator=generator)


def rounded(exact: Tensor, seed: int) -> Tensor:
    """Moved by what the shared states are moved by, and a little at random."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.01 * torch.randn(exact.shape, generator=generator)
    return exact + 0.02 * exact[:, :1] - 0.03 * exact[:, 1:2] + 1 + noise


def learnt(layers: int = 1) -> Correction:
    exact = [features(64, seed) for seed in range(layers)]
    moved = [rounded(rows, 9) for rows in exact]
    return Correction.learnt(torch.cat(exact, 1), torch.cat(moved, 1), layers)


def test_the_move_of_other_prompts_is_taken_back():
    exact = features(100, 7)
    found = learnt()(rounded(exact, 8))
    assert (found - exact).norm() < 0.05 * (rounded(exact, 8) - exact).norm()
    torch.testing.assert_close(learnt()(rounded(exact, 8)[3]), found[3])


def test_equal_weights_move_nothing():
    rows = features(20, 1)
    assert torch.equal(Correction.learnt(rows, rows, 1)(features(5, 2)), features(5, 2))


def test_layers_are_corrected_apart_and_from_the_lowest_on():
    correction = learnt(layers=2)
    low, high = rounded(features(10, 3), 4), rounded(features(10, 5), 6)
    both = correction(torch.cat([low, high], 1))
    torch.testing.assert_close(correction(low), both[:, :WIDTH])
    unread = correction(torch.cat([low, torch.full_like(high, torch.nan)], 1))
    torch.testing.assert_close(unread[:, :WIDTH], both[:, :WIDTH])
    assert unread[:, WIDTH:].isnan().all()


def test_whoever_is_told_features_is_told_corrected_ones():
    correction, rows = learnt(), rounded(features(3, 3), 4)
    told: list[Tensor] = []

    def forward(batch: Batch) -> Forward:
        batch.settle(rows[:2])
        batch.decide(5, rows[2])
        return Forward(rows, rows, GatePlan(0, False))

    batch = Batch(
        settle=lambda found: told.append(found) or [False, False],
        decide=lambda index, found: told.append(found),
    )
    found = correction.forward(SimpleNamespace(forward=forward), batch)
    wanted = correction(rows)
    torch.testing.assert_close(torch.cat([told[0], told[1][None]]), wanted)
    torch.testing.assert_close(found.features, wanted)
    assert torch.equal(found.logits, rows)
