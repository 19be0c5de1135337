"""The fit's learning rate and its pace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.routing.training import CONSTANT, Pace, train


def fitted(pace: Pace | None, seed: int = 0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.nn.functional.one_hot(labels, 3).float() @ torch.randn(3, 8, generator=generator)
    features = features + 0.1 * torch.randn(60, 8, generator=generator)
    options = {} if pace is None else {"pace": pace}
    return train(
        features[:45],
        labels[:45],
        features[45:],
        labels[45:],
        classes=3,
        hidden=[8],
        epochs=20,
        batch_size=8,
        learning_rate=1e-2,
        seed=seed,
        **options,
    )


@pytest.mark.parametrize("kind", ["constant", "batch", "focal"])
def test_every_pace_learns_and_repeats_itself(kind):
    first, second = fitted(Pace(kind)), fitted(Pace(kind))
    assert first.accuracy == 1
    for (weight, bias), (other_weight, other_bias) in zip(first.layers, second.layers, strict=True):
        assert torch.equal(weight, other_weight)
        assert torch.equal(bias, other_bias)


def test_the_default_is_the_constant_rate_and_others_differ_from_it():
    default = fitted(None).layers[0][0]
    assert torch.equal(default, fitted(CONSTANT).layers[0][0])
    for kind in ("batch", "focal"):
        assert not torch.equal(default, fitted(Pace(kind)).layers[0][0])


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_factor_stays_in_its_bounds_and_is_one_for_a_usual_batch(loss, usual):
    pace = Pace("batch", low=0.25, high=3)
    assert 0.25 <= pace.factor(loss, usual) <= 3
    assert pace.factor(max(loss, 1e-9), max(loss, 1e-9)) == 1
    assert Pace().factor(loss, usual) == 1


def test_a_harder_batch_takes_a_larger_step():
    pace = Pace("batch")
    assert pace.factor(0.5, 1) < pace.factor(1, 1) < pace.factor(1.5, 1)


def test_focal_weights_prefer_what_is_known_badly_and_keep_their_mean():
    logits, labels = torch.tensor([[5.0, 0.0], [0.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 0])
    weights = Pace("focal").weights(logits, labels)
    assert weights is not None
    assert weights[0] < weights[1] < weights[2]
    assert weights.mean() == pytest.approx(1)
    certain = Pace("focal").weights(torch.tensor([[99.0, 0.0]] * 2), labels[:2])
    assert certain is not None
    assert certain.tolist() == pytest.approx([1, 1])
    assert Pace().weights(logits, labels) is None
