"""A fine-tune becomes an expert of a bundle, and the bundle's router learns of it."""

import pytest
import torch

from experts.compression import CompressionSpec
from experts.errors import MismatchError, RoutingError
from experts.registry import describe_source, prepare_expert, profile_prompts, refit_router
from experts.routing import load_prompts
from tests.fixtures.bundles import with_expert
from tests.fixtures.tiny import tiny_fine_tune, tiny_model, tiny_prompts


def test_an_expert_prepared_later_equals_the_one_that_was_built_in(family, bundle):
    later = prepare_expert(bundle, "alpha", family.fine_tunes["alpha"])
    built = bundle.expert("alpha")
    assert set(later.factors) == set(built.factors)
    for name, factors in later.factors.items():
        assert torch.equal(factors.U, built.factors[name].U)
        assert torch.equal(factors.S, built.factors[name].S)


def test_a_full_fine_tune_can_join_without_the_base(family, bundle, tmp_path):
    folder = tiny_fine_tune(tmp_path / "full", family.base, seed=5)
    spec = CompressionSpec(energy=1.0, dtype="float32", extras="exact")
    compressed = prepare_expert(bundle, "delta", folder, spec)
    updated = with_expert(bundle, "delta", compressed, describe_source(folder), spec)
    expert = updated.expert("delta")
    target = type(bundle.shared).open(folder)
    for name in bundle.shared.names:
        change = expert.factors[name].dense() if name in expert.factors else expert.exact[name]
        assert torch.allclose(bundle.shared.tensor(name) + change, target.tensor(name), atol=1e-5), name
    assert updated.entry("delta").source.kind == "full"
    assert updated.entry("delta").compression == spec


def test_a_fine_tune_of_another_shape_is_refused(bundle, tmp_path):
    other = tiny_model("llama", tmp_path / "other", hidden_size=32)
    with pytest.raises(MismatchError):
        prepare_expert(bundle, "delta", other)


def test_a_refitted_router_knows_the_new_expert_and_still_the_old_ones(bundle, tmp_path):
    prompts = [line.prompt for line in load_prompts(tiny_prompts(tmp_path / "prompts.jsonl", "delta"))]
    features, forms = profile_prompts(bundle, bundle.router(), prompts)
    assert forms == 2
    router = refit_router(bundle.router(), "delta", features, forms=forms)
    assert router.names == ("alpha", "beta", "delta", "gamma")
    assert router.record.validation_accuracy > 0.9
    assert router.probabilities(features)[:, 2].mean() > 0.8


def test_impossible_refits_are_refused(bundle):
    with pytest.raises(RoutingError, match="already knows"):
        refit_router(bundle.router(), "alpha", torch.zeros(40, 128))
    with pytest.raises(RoutingError, match="at least 8 prompts"):
        refit_router(bundle.router(), "delta", torch.zeros(14, 128), forms=2)
    with pytest.raises(RoutingError, match="different widths"):
        refit_router(bundle.router(), "delta", torch.zeros(16, 64))
