"""The MLP router: fitted on validation, calibrated, kept and read back."""

import dataclasses
import math

import pytest
import torch

from experts.errors import RoutingError
from experts.routing import FeatureSpec, MlpRouter, load_router
from experts.routing.training import CONSTANT, TEMPERATURE_RANGE, Pace, calibrate

SPEC = FeatureSpec(pooling="mean")
NAMES = ("a", "b", "c")


def clusters(count: int, seed: int, noise: float = 0.5, names=NAMES) -> dict[str, torch.Tensor]:
    """Features (count, 8) around one centre an expert, on a scale that needs standardising."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 100 + 5 * (3 * torch.eye(8)[i] + noise * torch.randn(count, 8, generator=generator))
        for i, name in enumerate(names)
    }


def fitted(**options) -> MlpRouter:
    return MlpRouter.fit(clusters(40, 1), clusters(10, 2), SPEC, **{"epochs": 30, "hidden": 32} | options)


def test_probabilities_sum_to_one_and_name_the_right_expert():
    router = fitted()
    for column, (name, features) in enumerate(clusters(20, 3).items()):
        rows = router.probabilities(features)
        assert rows.shape == (20, 3)
        assert torch.allclose(rows.sum(1), torch.ones(20))
        assert (rows.argmax(1) == column).float().mean() > 0.9, name


def test_the_same_inputs_and_seed_give_the_same_router():
    before = torch.random.get_rng_state()
    one, two, other = fitted(seed=5), fitted(seed=5), fitted(seed=6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(
        torch.equal(a, b)
        for x, y in zip(one.layers, two.layers, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert one.temperature == two.temperature
    assert not torch.equal(one.layers[0][0], other.layers[0][0])


def test_a_larger_prompts_file_does_not_attract_requests():
    training = clusters(20, 1, noise=3.0, names=("a", "b"))
    training["a"] = training["a"].repeat(20, 1)
    router = MlpRouter.fit(training, clusters(50, 2, noise=3.0, names=("a", "b")), SPEC, epochs=20, hidden=16)
    halfway = (training["a"].mean(0) + training["b"].mean(0))[None] / 2
    assert 0.2 < float(router.probabilities(halfway)[0, 0]) < 0.8


def test_the_record_tells_validation_accuracy_and_confusion():
    record = fitted().record
    assert [sum(row) for row in record.confusion] == [10, 10, 10]
    right = sum(record.confusion[i][i] for i in range(3))
    assert record.validation_accuracy == pytest.approx(right / 30)
    assert record.nll <= record.nll_uncalibrated + 1e-6
    assert 1 <= record.best_epoch <= record.epochs


def test_calibration_finds_the_temperature_of_overconfident_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    assert calibrate(logits * 4, labels) == pytest.approx(4, rel=0.1)


def test_the_temperature_stays_in_its_range():
    logits = torch.eye(3) * 5
    assert calibrate(logits, torch.arange(3)) == pytest.approx(TEMPERATURE_RANGE[0], rel=1e-3)
    assert calibrate(logits, torch.tensor([1, 2, 0])) == pytest.approx(TEMPERATURE_RANGE[1], rel=1e-3)


def test_a_saved_router_is_read_back_as_it_was(tmp_path):
    router = fitted().at_generation(3)
    router.save(tmp_path)
    loaded = load_router(tmp_path)
    features = clusters(5, 4)["b"]
    assert torch.equal(loaded.probabilities(features), router.probabilities(features))
    assert (loaded.names, loaded.spec, loaded.generation) == (router.names, SPEC, 3)
    assert loaded.record == router.record


def test_without_one_expert_the_others_keep_their_odds():
    router = fitted()
    features = clusters(5, 4, noise=2.0)["b"]
    all_three, two = router.probabilities(features), router.without("b").probabilities(features)
    assert router.without("b").names == ("a", "c")
    assert torch.allclose(two[:, 0] / two[:, 1], all_three[:, 0] / all_three[:, 2], rtol=1e-3)
    assert len(router.without("b").record.confusion) == 2
    assert router.without("nobody") is router


def test_without_its_last_expert_there_is_no_router():
    router = fitted().without("a").without("b")
    assert torch.equal(router.probabilities(torch.zeros(2, 8)), torch.ones(2, 1))
    assert router.without("c") is None


def test_profiles_keep_a_bounded_number_of_features_close_to_the_originals():
    training, validation = clusters(400, 1), clusters(100, 2)
    router = MlpRouter.fit(training, validation, SPEC, epochs=1)
    kept, held_out = router.profile("a")
    assert (kept.shape, held_out.shape) == ((150, 8), (50, 8))
    distances = torch.cdist(kept, training["a"], compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert float(distances.max()) < 0.05


def test_constant_features_do_not_break_the_fit():
    flat = {name: features.clone().fill_(7.0) for name, features in clusters(12, 1).items()}
    router = MlpRouter.fit(flat, flat, SPEC, epochs=2)
    assert torch.isfinite(router.probabilities(flat["a"])).all()


@pytest.mark.parametrize(
    ("training", "validation", "says"),
    [
        ({}, {}, "at least one expert"),
        (clusters(4, 1), clusters(4, 1, names=("a", "b")), r"\['c'\] have no features"),
        ({"a": torch.zeros(0, 8)}, {"a": torch.zeros(1, 8)}, "'a' has no train features"),
        ({"a": torch.zeros(1, 8)}, {"a": torch.zeros(0, 8)}, "'a' has no validation features"),
        ({"a": torch.full((2, 8), math.nan)}, {"a": torch.zeros(1, 8)}, "NaN or Inf"),
        ({"a": torch.zeros(2, 8)}, {"a": torch.zeros(1, 9)}, "different widths"),
    ],
)
def test_a_fit_on_impossible_features_is_refused(training, validation, says):
    with pytest.raises(RoutingError, match=says):
        MlpRouter.fit(training, validation, SPEC)


def test_features_of_another_width_are_refused():
    with pytest.raises(RoutingError, match=r"reads \(n, 8\)"):
        fitted().probabilities(torch.zeros(1, 9))


@pytest.mark.parametrize("name", ["router.json", "router.safetensors"])
def test_a_missing_or_broken_file_is_named(tmp_path, name):
    fitted().save(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(RoutingError, match=name):
        load_router(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RoutingError, match=name):
        load_router(tmp_path)


def test_tensors_that_do_not_fit_the_names_are_refused(tmp_path):
    router = fitted()
    dataclasses.replace(router, layers=(*router.layers[:-1], (torch.zeros(2, 32), torch.zeros(2)))).save(
        tmp_path
    )
    with pytest.raises(RoutingError, match="shapes do not fit"):
        load_router(tmp_path)


def test_an_unknown_kind_of_router_is_refused(tmp_path):
    (tmp_path / "router.json").write_text('{"kind": "oracle"}')
    with pytest.raises(RoutingError, match="'oracle' is unknown"):
        load_router(tmp_path)


def test_a_router_is_fitted_at_its_pace_and_refitted_at_the_same(tmp_path):
    plain, focal = fitted(), fitted(pace=Pace("focal"))
    assert not torch.equal(plain.layers[0][0], focal.layers[0][0])
    focal.save(tmp_path)
    again = load_router(tmp_path).refitted("a", clusters(40, 3)["a"], clusters(10, 4)["a"], seed=0)
    assert again.record.pace == Pace("focal")
    plain.save(tmp_path)
    assert "pace" not in (tmp_path / "router.json").read_text()
    assert load_router(tmp_path).record.pace == CONSTANT


def test_a_refit_is_of_the_size_and_length_of_the_first_fit():
    router = fitted(hidden=24, epochs=3, learning_rate=2e-3, guard_rate=0.05)
    again = router.refitted("a", clusters(40, 3)["a"], clusters(10, 4)["a"], seed=0)
    assert again.layers[0][0].shape == router.layers[0][0].shape
    assert (again.record.epochs, again.record.learning_rate) == (3, 2e-3)
    assert again.describe()["guard_rate"] == 0.05
