"""Publishing and retiring: atomic, compare-and-swap, old generations untouched."""

import threading

import pytest
import torch

from experts.bundle import Bundle
from experts.compression import CompressionSpec
from experts.errors import (
    BundleError,
    DuplicateExpertError,
    ExpertsError,
    GenerationConflictError,
    MismatchError,
    RoutingError,
    UnknownExpertError,
)
from experts.registry import describe_source, prepare_expert, profile_prompts, refit_router
from experts.routing import load_prompts
from tests.fixtures.tiny import tiny_fine_tune, tiny_lora, tiny_model, tiny_prompts


@pytest.fixture(scope="session")
def newcomer(family, tmp_path_factory):
    """A LoRA of the family's base that is not in the bundle."""
    return tiny_lora(tmp_path_factory.mktemp("newcomer") / "lora", family.base, rank=3, seed=77)


@pytest.fixture(scope="session")
def source(newcomer):
    return describe_source(newcomer)


@pytest.fixture
def compressed(bundle, newcomer):
    return prepare_expert(bundle, "delta", newcomer)


def features_of(bundle, tmp_path, name="delta"):
    prompts = [line.prompt for line in load_prompts(tiny_prompts(tmp_path / "prompts.jsonl", name))]
    return profile_prompts(bundle, prompts)


def test_a_published_expert_is_there_at_generation_one(bundle, compressed, source):
    updated = bundle.publish_expert(compressed, "delta", None, None, source)
    assert updated.expert_names() == ("alpha", "beta", "delta", "gamma")
    assert updated.expert("delta").generation == 1
    assert not updated.entry("delta").routed
    assert updated.router().names == ("alpha", "beta", "gamma")
    assert Bundle.open(bundle.path).manifest == updated.manifest


def test_a_replaced_expert_keeps_the_old_generation_on_disk_for_who_has_it_open(bundle, compressed, source):
    before = bundle.expert("alpha")
    updated = bundle.publish_expert(compressed, "alpha", None, 1, source)
    assert updated.expert("alpha").generation == 2
    again = bundle.expert("alpha")
    assert again.generation == 1
    name = next(iter(before.factors))
    assert torch.equal(again.factors[name].U, before.factors[name].U)
    assert not torch.equal(updated.expert("alpha").factors[name].U, before.factors[name].U)


def test_the_wrong_expectation_is_refused_and_changes_nothing(bundle, compressed, source):
    manifest = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(DuplicateExpertError, match="'alpha' exists"):
        bundle.publish_expert(compressed, "alpha", None, None, source)
    with pytest.raises(GenerationConflictError, match="at generation 1, not 4"):
        bundle.publish_expert(compressed, "alpha", None, 4, source)
    with pytest.raises(UnknownExpertError, match="no expert 'delta' whose generation 1"):
        bundle.publish_expert(compressed, "delta", None, 1, source)
    assert (bundle.path / "manifest.json").read_bytes() == manifest


def test_the_expectation_is_held_against_the_disk_not_against_what_was_opened(bundle, compressed, source):
    Bundle.open(bundle.path).publish_expert(compressed, "alpha", None, 1, source)
    with pytest.raises(GenerationConflictError, match="at generation 2, not 1"):
        bundle.publish_expert(compressed, "alpha", None, 1, source)


def test_of_many_publishers_of_one_name_exactly_one_succeeds(bundle, compressed, source):
    outcomes = []

    def publish():
        try:
            outcomes.append(Bundle.open(bundle.path).publish_expert(compressed, "delta", None, None, source))
        except ExpertsError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=publish) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, Bundle) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, DuplicateExpertError) for outcome in outcomes) == 5
    assert Bundle.open(bundle.path).entry("delta").generation == 1


def test_a_generation_number_left_behind_by_a_crash_is_not_used_again(bundle, compressed, source):
    (bundle.path / "experts" / "delta" / "4").mkdir(parents=True)
    assert bundle.publish_expert(compressed, "delta", None, None, source).entry("delta").generation == 5


@pytest.mark.parametrize("name", ["../delta", "shared", "tiny", ""])
def test_a_name_that_is_not_allowed_is_refused(bundle, compressed, source, name):
    with pytest.raises(BundleError, match="name"):
        bundle.publish_expert(compressed, name, None, None, source)


def test_a_retired_expert_is_gone_and_the_router_chooses_among_the_others(bundle):
    updated = bundle.retire_expert("beta")
    assert updated.expert_names() == ("alpha", "gamma")
    assert updated.router().names == ("alpha", "gamma")
    assert updated.router().generation == 2
    assert updated.manifest.experts["beta"].state == "retired"
    assert bundle.expert("beta").generation == 1
    with pytest.raises(UnknownExpertError):
        updated.expert("beta")
    with pytest.raises(UnknownExpertError, match="to retire"):
        updated.retire_expert("beta")


def test_a_retired_name_comes_back_at_the_next_generation(bundle, compressed, source):
    again = bundle.retire_expert("beta").publish_expert(compressed, "beta", None, None, source)
    assert again.entry("beta").generation == 2
    assert not again.entry("beta").routed


def test_without_its_last_expert_a_bundle_has_no_router_and_still_opens(bundle):
    for name in ("alpha", "beta", "gamma"):
        bundle = bundle.retire_expert(name)
    assert bundle.expert_names() == ()
    assert bundle.router() is None
    assert Bundle.open(bundle.path).router() is None


def test_a_bundle_that_was_rebuilt_meanwhile_is_not_updated(bundle, compressed, source):
    file = bundle.path / "manifest.json"
    file.write_text(file.read_text().replace(bundle.manifest.build_id, "0" * 32))
    with pytest.raises(BundleError, match="was rebuilt"):
        bundle.publish_expert(compressed, "delta", None, None, source)


def test_a_bundle_that_cannot_be_written_says_so(bundle, compressed, source):
    (bundle.path / "experts" / "delta").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be updated"):
        bundle.publish_expert(compressed, "delta", None, None, source)
    assert Bundle.open(bundle.path, verify=True).expert_names() == ("alpha", "beta", "gamma")


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
    updated = bundle.publish_expert(compressed, "delta", None, None, describe_source(folder), spec)
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


def test_a_refitted_router_knows_the_new_expert_and_still_the_old_ones(bundle, compressed, source, tmp_path):
    features, forms = features_of(bundle, tmp_path)
    assert forms == 2
    router = refit_router(bundle, "delta", features, forms=forms)
    updated = bundle.publish_expert(compressed, "delta", router, None, source)
    assert updated.router().names == ("alpha", "beta", "delta", "gamma")
    assert updated.router().generation == 2
    assert updated.entry("delta").routed
    assert router.record.validation_accuracy > 0.9
    assert updated.router().probabilities(features)[:, 2].mean() > 0.8


def test_a_router_fitted_before_another_registration_does_not_undo_it(bundle, compressed, source, tmp_path):
    features, forms = features_of(bundle, tmp_path)
    late = refit_router(bundle, "epsilon", features, forms=forms)
    bundle.publish_expert(
        compressed, "delta", refit_router(bundle, "delta", features, forms=forms), None, source
    )
    with pytest.raises(GenerationConflictError, match=r"\['delta'\]"):
        bundle.publish_expert(compressed, "epsilon", late, None, source)


def test_a_router_that_names_a_stranger_is_refused(bundle, compressed, source, tmp_path):
    features, forms = features_of(bundle, tmp_path)
    router = refit_router(bundle, "stranger", features, forms=forms)
    with pytest.raises(BundleError, match=r"\['stranger'\]"):
        bundle.publish_expert(compressed, "delta", router, None, source)
    assert Bundle.open(bundle.path).router().generation == 1


def test_impossible_refits_are_refused(bundle):
    with pytest.raises(RoutingError, match="already knows"):
        refit_router(bundle, "alpha", torch.zeros(40, 128))
    with pytest.raises(RoutingError, match="at least 8 prompts"):
        refit_router(bundle, "delta", torch.zeros(14, 128), forms=2)
    with pytest.raises(RoutingError, match="different widths"):
        refit_router(bundle, "delta", torch.zeros(16, 64))


def test_a_publication_can_be_taken_back_with_its_router(bundle, compressed, source, tmp_path):
    features, forms = features_of(bundle, tmp_path)
    router = refit_router(bundle, "delta", features, forms=forms)
    published = bundle.publish_expert(compressed, "delta", router, None, source)
    assert published.router().generation == 2
    reverted = bundle.revert_expert("delta")
    assert reverted.manifest.experts == bundle.manifest.experts
    assert reverted.router().generation == 1
    again = reverted.publish_expert(compressed, "delta", None, None, source)
    assert again.entry("delta").generation == 2


def test_a_replacement_that_is_taken_back_leaves_the_old_generation_current(bundle, compressed, source):
    bundle.publish_expert(compressed, "alpha", None, 1, source)
    reverted = bundle.revert_expert("alpha")
    assert reverted.expert("alpha").generation == 1
    assert reverted.publish_expert(compressed, "alpha", None, 1, source).expert("alpha").generation == 3


def test_taking_back_what_was_never_published_changes_nothing(bundle):
    manifest = (bundle.path / "manifest.json").read_bytes()
    assert bundle.revert_expert("delta").manifest == bundle.manifest
    assert bundle.revert_expert("alpha").manifest == bundle.manifest
    assert (bundle.path / "manifest.json").read_bytes() == manifest


def test_taking_back_never_undoes_another_experts_change(bundle, compressed, source):
    bundle.publish_expert(compressed, "delta", None, None, source)
    Bundle.open(bundle.path).retire_expert("beta")
    with pytest.raises(GenerationConflictError, match="another expert has changed"):
        bundle.revert_expert("delta")
    assert Bundle.open(bundle.path).expert_names() == ("alpha", "delta", "gamma")


def test_what_a_killed_publisher_left_half_written_is_removed_by_the_next(bundle, compressed, source):
    stale = bundle.path / "experts" / "delta" / ".1.0123abcd"
    stale.mkdir(parents=True)
    (stale / "expert.safetensors").write_bytes(b"half")
    assert bundle.publish_expert(compressed, "delta", None, None, source).entry("delta").generation == 1
    assert [child.name for child in stale.parent.iterdir()] == ["1"]
