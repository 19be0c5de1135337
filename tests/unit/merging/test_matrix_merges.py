"""Merges of matrices by their singular vectors: worked cases, and products against dense matrices."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.factors import LowRank, dense
from experts.merging.iso_c import iso_c
from experts.merging.low_rank import total
from experts.merging.model_stock import inner_products, model_stock_ratio
from experts.merging.spectrum import orthogonalised, spectrum
from experts.merging.tsv import tsv

families = st.tuples(
    st.integers(0, 10_000), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans()
)


def products(seed: int, ranks: list[int], tall: bool) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (31, 22) if tall else (22, 31)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [LowRank(draw(rows, rank), draw(rank, columns)) for rank in ranks]


@given(families, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_tsv_of_products_is_that_of_the_dense_matrices(
    family: tuple[int, list[int], bool], rank: int
) -> None:
    deltas = products(*family)
    low_rank = tsv(deltas, rank, 0.8)
    from_dense = tsv([delta.dense() for delta in deltas], rank, 0.8)
    torch.testing.assert_close(low_rank.dense(), from_dense.dense(), atol=2e-3, rtol=1e-3)


@given(families)
@settings(max_examples=40, deadline=None)
def test_iso_c_of_products_is_that_of_the_dense_matrices(family: tuple[int, list[int], bool]) -> None:
    deltas = products(*family)
    low_rank, from_dense = iso_c(deltas, 0.8), iso_c([delta.dense() for delta in deltas], 0.8)
    torch.testing.assert_close(low_rank.dense(), from_dense.dense(), atol=2e-3, rtol=1e-3)


@given(families)
@settings(max_examples=40, deadline=None)
def test_inner_products_of_products_are_those_of_the_dense_matrices(
    family: tuple[int, list[int], bool],
) -> None:
    deltas = products(*family)
    torch.testing.assert_close(
        inner_products(deltas), inner_products([delta.dense() for delta in deltas]), atol=1e-2, rtol=1e-4
    )


@given(families)
@settings(max_examples=20, deadline=None)
def test_sums_of_products_stay_products_while_those_are_narrower_than_the_matrix(
    family: tuple[int, list[int], bool],
) -> None:
    deltas = products(*family)
    summed = total(deltas, 0.3)
    rank = sum(delta.rank for delta in deltas)
    assert isinstance(summed, LowRank) == (rank < min(deltas[0].shape))
    if isinstance(summed, LowRank):
        assert summed.rank == rank
    torch.testing.assert_close(
        dense(summed), 0.3 * sum(delta.dense() for delta in deltas), atol=1e-4, rtol=1e-4
    )


@given(families)
@settings(max_examples=40, deadline=None)
def test_tsv_directions_are_orthonormal_and_its_values_are_the_tasks_own(
    family: tuple[int, list[int], bool],
) -> None:
    deltas = products(*family)
    merged = tsv(deltas, 2, 1.0)
    gram = merged.down @ merged.down.T
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)
    expected = torch.cat([torch.linalg.svdvals(delta.dense())[: min(2, delta.rank)] for delta in deltas])
    lengths = torch.linalg.vector_norm(merged.up, dim=0)
    torch.testing.assert_close(lengths, expected, atol=1e-3, rtol=1e-3)


def test_tsv_of_tasks_that_do_not_interfere_is_their_sum() -> None:
    first, second = torch.zeros(6, 8), torch.zeros(6, 8)
    first[:2, :3] = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    second[3:5, 4:8] = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tsv([first, second], 3, 1.0).dense(), first + second, atol=1e-5, rtol=1e-5)


def test_tsv_of_twice_the_same_task_is_that_task() -> None:
    delta = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tsv([delta, delta], 5, 1.0).dense(), delta, atol=1e-5, rtol=1e-5)


def test_tsv_keeps_the_leading_directions_of_each_task() -> None:
    delta = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0]))
    torch.testing.assert_close(
        tsv([delta], 2, 0.5).dense(), torch.diag(torch.tensor([2.5, 1.5, 0, 0])), atol=1e-6, rtol=0
    )


def test_iso_c_levels_the_singular_values_of_the_sum() -> None:
    first, second = torch.diag(torch.tensor([4.0, 0, 1.0])), torch.diag(torch.tensor([0, 2.0, 1.0]))
    expected = 0.5 * torch.diag(torch.full((3,), 8 / 3))
    torch.testing.assert_close(iso_c([first, second], 0.5).dense(), expected, atol=1e-6, rtol=0)


def test_merges_of_singular_vectors_take_changes_that_are_zero() -> None:
    zero = LowRank(torch.zeros(6, 2), torch.randn(2, 8))
    other = LowRank(torch.randn(6, 2), torch.randn(2, 8))
    assert not tsv([zero], 2, 1.0).dense().any()
    assert not iso_c([zero], 1.0).dense().any()
    torch.testing.assert_close(tsv([zero, other], 2, 1.0).dense(), other.dense(), atol=1e-4, rtol=1e-4)


def test_orthogonalising_changes_orthonormal_columns_not_at_all() -> None:
    columns, _ = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64))
    torch.testing.assert_close(orthogonalised(columns), columns)


def test_a_spectrum_leaves_out_what_is_rounding() -> None:
    left, right = torch.randn(20, 3), torch.randn(3, 15)
    assert len(spectrum(left @ right).values) == 3
    assert len(spectrum(LowRank(torch.cat([left, left], 1), torch.cat([right, right]))).values) == 3


def test_model_stock_goes_to_the_average_of_parallel_task_vectors_and_stays_for_square_ones() -> None:
    assert model_stock_ratio(torch.ones(3, 3, dtype=torch.float64), 3) == 1.0
    assert model_stock_ratio(torch.eye(3, dtype=torch.float64), 3) == 0.0
    # Two vectors at 60°: t = 2·½ / (1 + ½).
    gram = torch.tensor([[4.0, 3.0], [3.0, 9.0]], dtype=torch.float64)
    assert abs(model_stock_ratio(gram, 2) - 2 / 3) < 1e-12


def test_model_stock_never_leaves_the_segment() -> None:
    assert model_stock_ratio(torch.tensor([[1.0, -0.9], [-0.9, 1.0]], dtype=torch.float64), 2) == 0.0
    assert model_stock_ratio(torch.tensor([[2.0]], dtype=torch.float64), 1) == 1.0
    # A third fine-tune that leaves the tensor is at right angles: the mean cosine is a third.
    both = torch.ones(2, 2, dtype=torch.float64)
    assert abs(model_stock_ratio(both, 3) - 3 * (1 / 3) / (1 + 2 / 3)) < 1e-12
