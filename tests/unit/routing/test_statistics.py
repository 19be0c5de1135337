"""Class means and one shared covariance: what is kept of prompts that are gone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import RoutingError
from experts.routing.statistics import ClassStatistics, split
from tests.unit.routing.prompts_like import clusters


def test_whitened_rows_spread_alike_in_every_direction():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    rows = {name: i * 9 + torch.randn(4000, 6, generator=generator) @ mix for i, name in enumerate("ab")}
    statistics = ClassStatistics.fit(rows)
    white = statistics.whiten(rows["a"] - rows["a"].mean(0))
    assert torch.allclose(torch.cov(white.T), torch.eye(6), atol=0.1)


def test_the_distance_to_ones_own_mean_is_about_one():
    statistics = ClassStatistics.fit(clusters(400, 1))
    distances = statistics.distances(clusters(200, 2)["b"])
    assert distances.shape == (200, 3)
    assert float(distances[:, 1].mean()) == pytest.approx(1, rel=0.1)
    assert (distances.argmin(1) == 1).all()


@settings(max_examples=20, deadline=None)
@given(count=st.integers(3, 40), seed=st.integers(0, 99))
def test_joining_gives_the_covariance_that_a_fit_of_all_gives(count, seed):
    all_three = clusters(count, seed)
    scale = ClassStatistics.fit({"a": all_three["a"], "b": all_three["b"]})
    joined = scale.joined("c", all_three["c"])
    rows = torch.cat([features - features.mean(0) for features in all_three.values()]) / scale.scale
    expected = rows.T @ rows / (3 * count - 3)
    found = joined.basis * joined.values @ joined.basis.T
    rest = joined.rest * (torch.eye(8) - joined.basis @ joined.basis.T)
    # Directions are kept in 16 bits.
    assert torch.allclose(found + rest, expected, atol=2e-3 * float(expected.abs().max()) + 1e-3)
    assert joined.count == 3 * count - 3
    assert joined.names == ("a", "b", "c")


def test_few_rows_are_shrunk_more_than_many():
    few, many = (ClassStatistics.fit(clusters(count, 1)).shrinkage for count in (4, 4000))
    assert 0 <= many <= few <= 1


def test_without_a_class_the_covariance_stays():
    statistics = ClassStatistics.fit(clusters(20, 1))
    fewer = statistics.without("b")
    assert fewer.names == ("a", "c")
    assert torch.equal(fewer.basis, statistics.basis)
    assert fewer.without("a").without("c") is None


def test_two_forms_of_one_class_become_two_prototypes():
    chat, raw = clusters(30, 1)["a"], 300 + clusters(30, 2)["a"]
    parts = split(torch.cat([chat, raw])[torch.randperm(60, generator=torch.Generator().manual_seed(0))], 2)
    assert sorted(len(part) for part in parts) == [30, 30]
    assert all(float(part.std(0).max()) < 10 for part in parts)
    statistics = ClassStatistics.fit({"a": torch.cat([chat, raw]), "b": clusters(30, 3)["b"]}, prototypes=2)
    assert statistics.by_class(statistics.distances(raw)).argmin(1).eq(0).all()


def test_too_few_rows_are_not_split():
    assert len(split(torch.randn(3, 4), 2)) == 1


def test_constant_features_give_finite_distances():
    flat = {name: rows.clone().fill_(7) for name, rows in clusters(5, 1).items()}
    assert torch.isfinite(ClassStatistics.fit(flat).distances(flat["a"])).all()


def test_statistics_are_read_back_as_they_were():
    statistics = ClassStatistics.fit(clusters(50, 1))
    again = ClassStatistics.read(statistics.owners, statistics.tensors("x."), "x.")
    rows = clusters(5, 2)["a"]
    assert torch.equal(again.distances(rows), statistics.distances(rows))
    with pytest.raises(RoutingError, match="do not fit"):
        ClassStatistics.read(("a",), statistics.tensors())
