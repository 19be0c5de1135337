"""An expert that is registered without prompts is routed to at once, where the router can."""

from pathlib import Path

import pytest
import torch

from experts.build import BuildPlan, build_bundle
from experts.bundle import Bundle
from experts.checkpoint import Checkpoint, open_fine_tune
from experts.registry import join_by_weights, known_by_prompts, task_of
from experts.registry.responses import readable, responses
from experts.routing import FeatureSpec, Router, decoder_layers
from experts.routing.loading import load_model
from tests.fixtures.tiny import TinyFamily, tiny_family, tiny_lora


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    return tiny_family(tmp_path_factory.mktemp("family"), experts=("alpha", "beta"), router=False)


def built(family: TinyFamily, out: Path, **options) -> Bundle:
    defaults = {"features": FeatureSpec(layer=1), "prompts": family.prompts}
    return build_bundle(BuildPlan(base=family.base, experts=family.fine_tunes, out=out, **defaults | options))


def joined(bundle: Bundle, family: TinyFamily, folder: Path) -> Router | None:
    source = tiny_lora(folder / "gamma", family.base, rank=2, seed=9)
    return join_by_weights(bundle.router(), bundle, "gamma", task_of(bundle, "gamma", source))


@pytest.mark.parametrize("kind", ["mlp", "gaussian", "nearest"])
def test_behind_a_guard_an_expert_is_routed_without_a_prompt(kind, family, tmp_path):
    router = joined(built(family, tmp_path / "bundle", router=kind, guard_rate=0.05), family, tmp_path)
    assert (router.kind, router.known.kind, router.names) == ("subspace", kind, ("alpha", "beta", "gamma"))
    assert router.without("gamma").names == ("alpha", "beta")


def test_a_data_free_router_needs_no_prompts_at_all(family, tmp_path):
    bundle = built(family, tmp_path / "bundle", router="subspace", prompts={})
    assert bundle.router().free == ("alpha", "beta")
    assert joined(bundle, family, tmp_path).free == ("alpha", "beta", "gamma")


def test_without_taps_a_data_free_router_reads_every_layer_below_the_last(family, tmp_path):
    layers = Checkpoint.open(family.base).config["num_hidden_layers"]
    bundle = built(family, tmp_path / "bundle", router="subspace", prompts={}, features=FeatureSpec())
    assert bundle.router().spec.read == tuple(range(1, layers))
    assert bundle.router().score == "contrast"


def test_experts_with_prompts_are_known_by_them_beside_those_without(family, tmp_path):
    bundle = built(family, tmp_path / "bundle", router="subspace", prompts={"alpha": family.prompts["alpha"]})
    assert bundle.router().free == ("beta",)
    assert bundle.router().known.names == ("alpha",)


def test_only_an_expert_with_prompts_keeps_its_place_when_a_generation_brings_none(family, tmp_path):
    bundle = built(family, tmp_path / "bundle", router="gaussian", guard_rate=0.05)
    router = joined(bundle, family, tmp_path)
    assert known_by_prompts(router, "alpha")
    assert not known_by_prompts(router, "gamma")
    assert not known_by_prompts(router, "nobody")
    before = router.rows
    source = tiny_lora(tmp_path / "other", family.base, rank=2, seed=10)
    after = join_by_weights(router, bundle, "gamma", task_of(bundle, "gamma", source))
    assert after.free == ("gamma",)
    assert not torch.equal(after.rows, before)


def test_without_a_guard_the_expert_waits_for_requests_that_name_it(family, tmp_path):
    assert joined(built(family, tmp_path / "bundle", router="mlp"), family, tmp_path) is None


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [("gpt_neox", 1), ("gpt2", 1), ("llama", 2)],
    ids=["neox", "gpt2", "last layer"],
)
def test_where_no_matrix_reads_the_routers_layer_the_expert_waits_too(architecture, layer, tmp_path):
    family = tiny_family(tmp_path / "f", architecture=architecture, experts=("alpha", "beta"), router=False)
    options = {"router": "gaussian", "guard_rate": 0.05, "features": FeatureSpec(layer=layer)}
    assert joined(built(family, tmp_path / "bundle", **options), family, tmp_path) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_rows_respond_as_the_change_does_to_a_normalised_state(architecture, tmp_path):
    family = tiny_family(tmp_path, architecture=architecture, experts=("alpha",), router=False)
    base = Checkpoint.open(family.base)
    tune = open_fine_tune("alpha", family.fine_tunes["alpha"], base)
    assert readable(base, (1,))
    assert not readable(base, (1, 2))
    rows = responses(tune.delta, base, (1,), rank=64)[0]
    layer = decoder_layers(load_model(family.base))[1]
    state = torch.randn(64, generator=torch.Generator().manual_seed(0))
    state *= state.square().mean().rsqrt()
    mlp_norm = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    for found, norm, group in (
        (rows[0], layer.input_layernorm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (rows[1], mlp_norm, ("mlp.gate_proj", "mlp.up_proj")),
    ):
        changes = torch.cat([tune.delta(f"model.layers.1.{each}.weight").dense() for each in group])
        with torch.no_grad():
            expected = (changes @ norm(state)).norm()
        assert torch.allclose((found @ state).norm(), expected, rtol=1e-3)
