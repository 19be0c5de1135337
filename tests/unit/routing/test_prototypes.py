"""Routers whose experts join by prototypes: gaussian and nearest."""

import time

import pytest
import torch

from experts.errors import RoutingError
from experts.routing import FeatureSpec, load_router
from experts.routing.gaussian import GaussianRouter
from experts.routing.nearest import NearestRouter
from tests.unit.routing.prompts_like import clusters, far_off

SPEC = FeatureSpec(pooling="mean")
KINDS = pytest.mark.parametrize("kind", [GaussianRouter, NearestRouter])


def fitted(kind, names=("a", "b", "c"), **options):
    training, held_out = (clusters(count, seed, names=names) for count, seed in ((40, 1), (20, 2)))
    return kind.fit(training, held_out, SPEC, **options)


@KINDS
def test_probabilities_sum_to_one_and_name_the_right_expert(kind):
    router = fitted(kind)
    for column, features in enumerate(clusters(20, 3).values()):
        rows = router.probabilities(features)
        assert rows.shape == (20, 3)
        assert torch.allclose(rows.sum(1), torch.ones(20))
        assert float((rows.argmax(1) == column).float().mean()) >= 0.8


@KINDS
def test_a_new_expert_joins_in_a_moment_and_the_others_keep_theirs(kind):
    router = fitted(kind, ("a", "b"))
    new = clusters(20, 5, names=("c",))["c"]
    began = time.perf_counter()
    joined = router.refitted("c", new[:16], new[16:], seed=0)
    assert time.perf_counter() - began < 1
    assert joined.names == ("a", "b", "c")
    for column, features in enumerate(clusters(20, 3).values()):
        assert float((joined.probabilities(features).argmax(1) == column).float().mean()) >= 0.8


@KINDS
def test_a_known_expert_is_known_anew(kind):
    moved = clusters(20, 5, names=("d",))["d"]
    router = fitted(kind).refitted("c", moved[:16], moved[16:], seed=0)
    assert router.names == ("a", "b", "c")
    assert (router.probabilities(clusters(10, 6, names=("d",))["d"]).argmax(1) == 2).all()


@KINDS
def test_confidence_is_calibrated_where_experts_overlap(kind):
    router = kind.fit(clusters(300, 1, noise=3.0), clusters(300, 2, noise=3.0), SPEC)
    rows = torch.cat([router.probabilities(features) for features in clusters(300, 3, noise=3.0).values()])
    right = (rows.argmax(1) == torch.arange(3).repeat_interleave(300)).float().mean()
    assert float(rows.max(1).values.mean()) == pytest.approx(float(right), abs=0.1)


@KINDS
@pytest.mark.parametrize("guard_rate", [None, 0.05])
def test_a_saved_router_is_read_back(kind, guard_rate, tmp_path):
    router = fitted(kind, guard_rate=guard_rate).at_generation(3)
    router.save(tmp_path)
    loaded = load_router(tmp_path)
    rows = torch.cat([clusters(5, 4)["b"], far_off(5, 1)])
    assert torch.equal(loaded.probabilities(rows), router.probabilities(rows))
    assert torch.equal(loaded.abstains(rows), router.abstains(rows))
    joined = router.refitted("d", clusters(40, 5, names=("d",))["d"], clusters(9, 6, names=("d",))["d"], 0)
    folder = tmp_path / "joined"
    folder.mkdir()
    joined.save(folder)
    assert torch.equal(load_router(folder).probabilities(rows), joined.probabilities(rows))
    assert (loaded.names, loaded.spec, loaded.generation) == (router.names, SPEC, 3)
    assert loaded.describe().keys() == router.describe().keys()


@KINDS
def test_without_its_last_expert_there_is_no_router(kind):
    router = fitted(kind).without("a").without("b")
    assert torch.equal(router.probabilities(torch.zeros(2, 8)), torch.ones(2, 1))
    assert router.without("nobody") is router
    assert router.without("c") is None


@KINDS
def test_features_of_another_width_are_refused(kind):
    with pytest.raises(RoutingError, match=r"reads \(n, 8\)"):
        fitted(kind).probabilities(torch.zeros(1, 9))
    with pytest.raises(RoutingError):
        fitted(kind).refitted("d", torch.zeros(9, 4), torch.zeros(2, 4), seed=0)
    with pytest.raises(RoutingError, match="no train features"):
        kind.fit({"a": torch.zeros(0, 8)}, {"a": torch.zeros(1, 8)}, SPEC)


@KINDS
@pytest.mark.parametrize("name", ["router.json", "router.safetensors"])
def test_a_missing_or_broken_file_is_named(kind, name, tmp_path):
    fitted(kind).save(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(RoutingError, match=name):
        load_router(tmp_path)
