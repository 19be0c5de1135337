"""Abstention: prompts like nobody's are left to the shared expert, and few others."""

import pytest
import torch

from experts.errors import RoutingError
from experts.routing import FeatureSpec, MlpRouter, load_router
from experts.routing.guard import Guard, level
from tests.unit.routing.prompts_like import clusters, far_off


def fitted(**options) -> Guard:
    return Guard.fit(clusters(100, 1), clusters(100, 2), **{"states": 1} | options)


def test_what_is_unlike_every_prompt_is_left_out_and_little_else():
    guard = fitted(rate=0.02)
    kept = torch.cat(list(clusters(200, 3).values()))
    assert float(guard.abstains(kept).float().mean()) < 0.06
    assert float(guard.abstains(far_off(200, 4)).float().mean()) > 0.9


def test_the_rate_is_that_of_the_held_out_prompts():
    held_out = torch.cat(list(clusters(100, 2).values()))
    for rate in (0.0, 0.1, 0.5):
        share = float(fitted(rate=rate).abstains(held_out).float().mean())
        assert share == pytest.approx(rate, abs=0.01)


def test_an_expert_that_joins_is_let_in_and_one_that_leaves_is_not():
    guard = Guard.fit(clusters(100, 1, names=("a", "b")), clusters(50, 2, names=("a", "b")), states=1)
    new = clusters(60, 5, names=("c",))["c"]
    assert float(guard.abstains(new).float().mean()) > 0.9
    joined = guard.joined("c", new[:40], new[40:])
    assert float(joined.abstains(clusters(60, 6, names=("c",))["c"]).float().mean()) < 0.2
    others = clusters(60, 7, names=("a", "b"))
    assert torch.equal(joined.abstains(others["a"]), guard.abstains(others["a"]))
    left = joined.without("c")
    assert torch.equal(left.scores(others["b"]), guard.scores(others["b"]))
    assert left.without("a").without("b") is None


def test_the_length_of_a_state_does_not_matter():
    rows = clusters(3, 1)["a"]
    assert torch.allclose(level(rows, 2), level(rows * torch.tensor([[2.0], [1.0], [9.0]]), 2), atol=1e-5)
    with pytest.raises(RoutingError, match="not made of 3 states"):
        level(rows, 3)


def test_a_rate_that_leaves_out_most_is_refused():
    with pytest.raises(RoutingError, match="guard rate"):
        fitted(rate=0.9)


def test_features_of_another_width_are_refused():
    with pytest.raises(RoutingError, match=r"reads \(n, 8\)"):
        fitted().abstains(torch.zeros(1, 4))


def test_a_guard_stays_with_its_mlp_router(tmp_path):
    router = MlpRouter.fit(
        clusters(40, 1), clusters(40, 2), FeatureSpec(pooling="mean"), epochs=2, hidden=8, guard_rate=0.05
    )
    rows = torch.cat([clusters(20, 3)["a"], far_off(20, 4)])
    router.save(tmp_path)
    assert torch.equal(load_router(tmp_path).abstains(rows), router.abstains(rows))
    assert router.abstains(far_off(20, 4)).float().mean() > 0.8
    assert router.without("a").guard.statistics.names == ("b", "c")
    new = clusters(20, 5, names=("d",))["d"]
    assert router.refitted("d", new[:16], new[16:], seed=0).guard.statistics.names == ("a", "b", "c", "d")


def test_a_router_without_a_guard_never_abstains():
    router = MlpRouter.fit(clusters(9, 1), clusters(9, 2), FeatureSpec(pooling="mean"), epochs=1, hidden=8)
    assert not router.abstains(far_off(5, 1)).any()


def test_of_no_prompts_nothing_is_left_out():
    assert fitted().abstains(torch.zeros(0, 8)).shape == (0,)
    assert level(torch.zeros(0, 8), 2).shape == (0, 8)
