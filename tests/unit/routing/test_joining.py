"""An expert that is registered without prompts is routed to at once, where the router can."""

from pathlib import Path

import pytest

from experts.build import BuildPlan, build_bundle
from experts.bundle import Bundle
from experts.registry import describe_source, join_by_weights, prepare_expert
from experts.routing import FeatureSpec
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return tiny_family(tmp_path_factory.mktemp("family"), experts=("alpha", "beta"), router=False)


def built(family: TinyFamily, out: Path, **options) -> Bundle:
    defaults = {"features": FeatureSpec(layer=1), "prompts": family.prompts}
    return build_bundle(BuildPlan(base=family.base, experts=family.fine_tunes, out=out, **defaults | options))


def joined(bundle: Bundle, family: TinyFamily, folder: Path) -> Bundle:
    source = tiny_lora(folder / "gamma", family.base, rank=2, seed=9)
    router = join_by_weights(bundle, "gamma", source)
    compressed = prepare_expert(bundle, "gamma", source)
    return bundle.publish_expert(compressed, "gamma", router, None, describe_source(source))


@pytest.mark.parametrize("kind", ["mlp", "gaussian", "nearest"])
def test_behind_a_guard_an_expert_is_routed_without_a_prompt(kind, family, tmp_path):
    bundle = joined(built(family, tmp_path / "bundle", router=kind, guard_rate=0.05), family, tmp_path)
    assert bundle.entry("gamma").routed
    router = bundle.router()
    assert (router.kind, router.known.kind, router.names) == ("subspace", kind, ("alpha", "beta", "gamma"))
    assert bundle.retire_expert("gamma").router().names == ("alpha", "beta")


def test_a_data_free_router_needs_no_prompts_at_all(family, tmp_path):
    bundle = built(family, tmp_path / "bundle", router="subspace", prompts={})
    assert bundle.router().free == ("alpha", "beta")
    assert joined(bundle, family, tmp_path).router().free == ("alpha", "beta", "gamma")


def test_experts_with_prompts_are_known_by_them_beside_those_without(family, tmp_path):
    bundle = built(family, tmp_path / "bundle", router="subspace", prompts={"alpha": family.prompts["alpha"]})
    assert bundle.router().free == ("beta",)
    assert bundle.router().known.names == ("alpha",)


def test_without_a_guard_the_expert_waits_for_requests_that_name_it(family, tmp_path):
    bundle = joined(built(family, tmp_path / "bundle", router="mlp"), family, tmp_path)
    assert not bundle.entry("gamma").routed
    assert bundle.router().names == ("alpha", "beta")
