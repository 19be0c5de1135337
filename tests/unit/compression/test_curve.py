from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.compression.baselines import dare, one_bit, sparse, sparse_count, sparse_nbytes
from experts.compression.curve import FORMS, CodecPoint, codec_points
from experts.errors import CompressionError
from experts.factors import Delta, LowRank, dense

NAMES = ("model.layers.0.a.weight", "model.layers.0.b.weight")


def stream() -> list[tuple[str, Delta | None]]:
    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(40, 6, generator=generator), torch.randn(6, 30, generator=generator))
    return [
        (NAMES[0], low),
        (NAMES[1], torch.randn(20, 40, generator=generator)),
        ("model.norm.weight", torch.ones(30)),
        ("model.embed_tokens.weight", None),
    ]


def points(**chosen: Any) -> list[CodecPoint]:
    return list(codec_points(stream, model_nbytes=4_000, **chosen))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_keeps_its_budgets_and_tells_its_error(form: Any) -> None:
    found = points(forms=[form], fractions=(0.001, 0.1, 0.3, 1.0))
    assert found
    whole = dict(stream())
    for point in found:
        budget = 4_000 if point.fraction is None else int(4_000 * point.fraction)
        assert 0 < point.nbytes <= budget
        assert set(point.changes) <= set(NAMES)
        lost = norm = 0.0
        for name in NAMES:
            delta = dense(whole[name])  # type: ignore[arg-type]
            kept = dense(point.changes[name]) if name in point.changes else torch.zeros(delta.shape)
            lost, norm = lost + float((delta - kept).square().sum()), norm + float(delta.square().sum())
        assert point.relative_error == pytest.approx((lost / norm) ** 0.5, rel=0.02, abs=1e-3)
    if form not in ("dare", "ternary"):  # one is rescaled, the other has its best error at some density
        errors = [point.relative_error for point in found]
        assert errors == sorted(errors, reverse=True)


def test_mixed_precision_is_no_worse_than_any_one_precision() -> None:
    forms = ("bfloat16", "int8", "int4", "mixed")
    at = {point.form: point.relative_error for point in points(forms=forms, fractions=(0.15,))}
    assert at["mixed"] <= min(at.values()) * 1.02


def test_sizes_beyond_the_whole_vector_have_no_point_of_their_own() -> None:
    found = points(forms=["int8"], fractions=(0.5, 0.9, 1.5, 2.0))
    assert len({point.nbytes for point in found}) == len(found)
    assert found[-1].relative_error < 0.01


@given(st.integers(1, 3000), st.floats(0.001, 1), st.sampled_from([1, 16]))
@settings(max_examples=60)
def test_as_many_entries_are_kept_as_fit(size: int, part: float, value_bits: int) -> None:
    budget = int(part * 4 * size)
    count = sparse_count(size, budget, value_bits)
    assert count == 0 or sparse_nbytes(size, count, value_bits) <= budget
    assert count == size or sparse_nbytes(size, count + 1, value_bits) > budget


def test_sparse_keeps_the_largest_and_counts_their_places() -> None:
    delta = torch.tensor([[1.0, -4.0, 0.5, 0.0], [3.0, 0.25, -2.0, 0.125]])
    kept, nbytes = sparse(delta, 0.25)
    assert kept.tolist() == [[0, -4, 0, 0], [3, 0, 0, 0]]
    assert nbytes == 2 * 2 + 1  # two values; two places of three bits, or a mask of eight
    signs, nbytes = sparse(delta, 0.25, value_bits=1)
    assert signs.tolist() == [[0, -3.5, 0, 0], [3.5, 0, 0, 0]]
    assert nbytes == 1 + 1 + 2


def test_one_bit_stores_signs_and_the_mean_magnitude() -> None:
    approximation, nbytes = one_bit(torch.tensor([[1.0, -3.0, 2.0], [-2.0, 4.0, 0.0]]))
    assert approximation.tolist() == [[2, -2, 2], [-2, 2, 2]]
    assert nbytes == 1 + 2


def test_dare_keeps_the_expectation_and_depends_on_its_seed_alone() -> None:
    delta = torch.ones(40, 50)
    approximation, nbytes = dare(delta, 0.1, seed=3)
    assert nbytes == 2 * 200 + 8
    assert float(approximation.mean()) == pytest.approx(1.0, rel=1e-3)
    torch.testing.assert_close(dare(delta, 0.1, seed=3)[0], approximation)
    assert not torch.equal(dare(delta, 0.1, seed=4)[0], approximation)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_an_impossible_density_is_refused(density: float) -> None:
    with pytest.raises(CompressionError, match="density"):
        sparse(torch.eye(3), density)
    with pytest.raises(CompressionError, match="density"):
        dare(torch.eye(3), density, 0)
    with pytest.raises(CompressionError, match="1 or 16"):
        sparse(torch.eye(3), 0.5, value_bits=3)


def test_a_budget_below_one_byte_has_no_point() -> None:
    forms = [form for form in FORMS if form != "one-bit"]
    assert list(codec_points(stream, model_nbytes=100, forms=forms, fractions=(0.001,))) == []
