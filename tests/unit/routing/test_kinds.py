"""Which code reads a router: the built-in kind, and those that installed packages declare."""

import json

import pytest
import torch

from experts.errors import RoutingError
from experts.routing import FeatureSpec, MlpRouter, Router, among, load_router, router_kinds
from tests.fixtures.nearest import NearestCentroid, install


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "site"))


@pytest.fixture
def router() -> Router:
    return NearestCentroid(("a", "b", "c"), FeatureSpec(), torch.eye(3))


def test_a_kind_of_an_installed_package_is_read_back_as_it_was(installed, router, tmp_path):
    router.at_generation(4).save(tmp_path)
    loaded = load_router(tmp_path)
    assert isinstance(loaded, NearestCentroid)
    assert (loaded.names, loaded.spec, loaded.generation) == (router.names, router.spec, 4)
    assert torch.equal(loaded.probabilities(torch.eye(3)), router.probabilities(torch.eye(3)))
    assert router_kinds() == ("centroid", "gaussian", "mlp", "nearest", "staged", "subspace")


def test_a_kind_that_is_not_installed_is_refused_with_those_that_are(router, tmp_path):
    router.save(tmp_path)
    with pytest.raises(
        RoutingError, match=r"router.json: router kind 'centroid' is unknown; installed are gaussian, mlp"
    ):
        load_router(tmp_path)


def test_a_package_that_cannot_be_imported_is_named(router, tmp_path, monkeypatch):
    site = install(tmp_path / "site")
    points = site / "nearest_router-1.0.dist-info" / "entry_points.txt"
    points.write_text("[twinserve.routers]\ncentroid = no_such_package:load\n")
    monkeypatch.syspath_prepend(site)
    router.save(tmp_path)
    with pytest.raises(RoutingError, match=r"'no_such_package:load' cannot be imported"):
        load_router(tmp_path)


def test_the_built_in_kind_cannot_be_taken_over(tmp_path, monkeypatch):
    site = install(tmp_path / "site")
    points = site / "nearest_router-1.0.dist-info" / "entry_points.txt"
    points.write_text("[twinserve.routers]\nmlp = tests.fixtures.nearest:NearestCentroid.load\n")
    monkeypatch.syspath_prepend(site)
    features = {name: torch.randn(10, 4) + index * 9 for index, name in enumerate("ab")}
    MlpRouter.fit(features, features, FeatureSpec(), epochs=1).save(tmp_path)
    assert isinstance(load_router(tmp_path), MlpRouter)


@pytest.mark.parametrize("content", [{}, {"kind": None}, {"kind": 5}])
def test_a_description_without_a_kind_is_refused(content, tmp_path):
    (tmp_path / "router.json").write_text(json.dumps(content))
    with pytest.raises(RoutingError, match="names no kind"):
        load_router(tmp_path)


def test_among_some_experts_the_router_chooses_among_those(router):
    assert among(router, {"a", "c", "stranger"}).names == ("a", "c")
    assert among(router, {"a", "b", "c"}) is router
    assert among(router, set()) is None
    assert among(None, {"a"}) is None
