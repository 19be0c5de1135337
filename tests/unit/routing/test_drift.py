"""How unlike its own prompts a router finds a prompt, whatever kind of router it is."""

import pytest
import torch

from experts.routing import FeatureSpec, MlpRouter, distance, fitted
from experts.routing.gaussian import GaussianRouter
from experts.routing.nearest import NearestRouter
from experts.routing.staged import StagedRouter

WIDTH = 12
SPEC = FeatureSpec(pooling="mean")


def _rows(seed: int, count: int, width: int = WIDTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    apart = torch.zeros(width)
    apart[: width // 2] = 4
    return {
        "a": torch.randn(count, width, generator=generator) + apart,
        "b": torch.randn(count, width, generator=generator) + apart.flip(0),
    }


@pytest.mark.parametrize("kind", [GaussianRouter, NearestRouter, MlpRouter])
def test_a_guarded_router_knows_its_own_prompts_from_strange_ones(kind):
    router = kind.fit(_rows(0, 120), _rows(1, 120), SPEC, guard_rate=0.02)
    own = torch.cat(list(_rows(2, 200).values()))
    found = torch.tensor([distance(router, row) for row in own])
    assert float(found.median()) == pytest.approx(0, abs=0.4)
    assert float((found > 1).float().mean()) < 0.15
    strange = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(3)) * 4
    far = torch.tensor([distance(router, row) for row in strange])
    assert float((far > 1).float().mean()) > 0.6
    expected = fitted(router)
    assert expected.abstention == 0.02
    assert expected.threshold == router.guard.threshold
    assert expected.accuracy == pytest.approx(1.0, abs=0.05)


def test_a_router_without_a_guard_has_no_distance():
    router = GaussianRouter.fit(_rows(0, 40), _rows(1, 40), SPEC)
    assert distance(router, _rows(2, 1)["a"][0]) is None
    assert fitted(router).abstention is None
    assert fitted(router).accuracy is not None


def test_a_prompt_that_was_settled_early_is_judged_by_what_was_read():
    spec = FeatureSpec(pooling="mean", layer=3, taps=(1,))
    rows, held = _rows(0, 80, 2 * WIDTH), _rows(1, 80, 2 * WIDTH)

    def make(train, validation, part):
        return GaussianRouter.fit(train, validation, part, guard_rate=0.02)

    router = StagedRouter.fit(rows, held, spec, coarse=make, fine=make)
    row = _rows(2, 1, 2 * WIDTH)["a"][0]
    whole = distance(router, row)
    assert whole == pytest.approx(float(router.fine.guard.scores(row[None])[0]), abs=1e-5)
    cut = row.clone()
    cut[WIDTH:] = torch.nan
    half = distance(router, cut)
    assert half == pytest.approx(float(router.coarse.guard.scores(row[None, :WIDTH])[0]), abs=1e-5)
    assert fitted(router).threshold == router.fine.guard.threshold
