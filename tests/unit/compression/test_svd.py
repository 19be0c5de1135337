import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.compression import exclusive_delta, truncated_svd
from experts.compression.solvers import DENSE_SOLVERS, Solver, Svd, gram_eigh, jacobi_svd, lapack_svd
from experts.compression.svd import decompose, frobenius, rounding
from experts.errors import CompressionError
from experts.factors import LowRank, dense

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))


def random_matrix(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_product(shape: tuple[int, int], rank: int, seed: int) -> LowRank:
    return LowRank(random_matrix((shape[0], rank), seed), random_matrix((rank, shape[1]), seed + 1))


def best_error(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


@given(shapes, st.integers(1, 14), st.integers(0, 1000))
def test_a_truncated_svd_is_the_best_approximation_of_its_rank(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    matrix = random_matrix(shape, seed)
    factors = truncated_svd(matrix, rank)
    assert factors.rank == min(rank, *shape)
    assert factors.shape == shape
    error = float((factors.dense() - matrix).norm())
    assert error == pytest.approx(best_error(matrix, rank), abs=1e-4)
    assert bool((factors.S[:-1] >= factors.S[1:]).all())
    assert bool((factors.S > 0).all())
    torch.testing.assert_close(factors.U.T @ factors.U, torch.eye(factors.rank), atol=1e-4, rtol=0)


@given(shapes, st.integers(1, 5), st.integers(0, 1000))
def test_a_product_is_decomposed_like_its_dense_form(shape: tuple[int, int], rank: int, seed: int) -> None:
    product = random_product(shape, rank, seed)
    from_product, from_dense = truncated_svd(product), truncated_svd(product.dense())
    true_rank = min(rank, *shape)
    assert from_product.rank == true_rank
    torch.testing.assert_close(from_product.dense(), product.dense(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(from_product.S, from_dense.S[:true_rank], atol=1e-4, rtol=1e-4)
    assert frobenius(product) == pytest.approx(float(product.dense().norm()), rel=1e-4)


def test_the_full_rank_of_a_matrix_reproduces_it_to_float32_rounding() -> None:
    for shape in ((40, 24), (24, 40), (32, 32)):
        matrix = random_matrix(shape, 1) * torch.logspace(0, -6, shape[1])
        torch.testing.assert_close(truncated_svd(matrix).dense(), matrix, atol=1e-6, rtol=0)


def test_singular_vectors_have_one_sign_whatever_the_solver() -> None:
    matrix = random_matrix((9, 7), 3)
    first = decompose(matrix, "w", (gram_eigh,))
    for solver in (lapack_svd, jacobi_svd):
        other = decompose(matrix, "w", (solver,))
        torch.testing.assert_close(other.U, first.U, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.Vh, first.Vh, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (16 / 26, 1), (0.62, 2), (25 / 26, 2), (0.99, 3), (1.0, 3), (1e-9, 1)]
)
def test_energy_keeps_the_smallest_rank_that_reaches_it(energy: float, rank: int) -> None:
    assert truncated_svd(torch.diag(torch.tensor([4.0, 3.0, 1.0])), energy=energy).rank == rank


def test_sixteen_bit_factors_lose_only_rounding() -> None:
    matrix = random_matrix((30, 20), 5)
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        factors = truncated_svd(matrix, dtype=dtype)
        assert factors.U.dtype == factors.Vh.dtype == dtype
        assert factors.S.dtype == torch.float32
        assert float((factors.dense() - matrix).norm() / matrix.norm()) < tolerance


def test_zero_has_rank_zero_and_cancelled_products_too() -> None:
    assert truncated_svd(torch.zeros(4, 3)).rank == 0
    product = random_product((8, 9), 2, 1)
    nothing = exclusive_delta(product, product)
    assert isinstance(nothing, LowRank)
    assert truncated_svd(nothing).rank == 0
    assert truncated_svd(LowRank(torch.zeros(5, 2), torch.zeros(2, 5))).rank == 0
    assert truncated_svd(LowRank(torch.zeros(5, 0), torch.zeros(0, 5))).rank == 0


def test_huge_and_tiny_values_keep_their_singular_values() -> None:
    for size in (1e-30, 1e30):
        factors = truncated_svd(torch.diag(torch.tensor([2.0, 1.0])) * size)
        torch.testing.assert_close(factors.S / size, torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_and_the_tensor_named(bad: float) -> None:
    matrix = torch.ones(3, 3)
    matrix[1, 1] = bad
    for delta in (matrix, LowRank(matrix, torch.ones(3, 9))):
        with pytest.raises(CompressionError, match=r"layer\.weight has NaN or Inf"):
            truncated_svd(delta, 2, name="layer.weight")


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(CompressionError, match="rank 0"):
        truncated_svd(torch.ones(2, 2), 0)
    with pytest.raises(CompressionError, match=r"energy 1\.5"):
        truncated_svd(torch.ones(2, 2), energy=1.5)
    with pytest.raises(CompressionError, match="only matrices"):
        truncated_svd(torch.ones(2), 1)


@pytest.mark.parametrize("solver", [*DENSE_SOLVERS])
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(0, 9)), seed=st.integers(0, 500), rank=st.integers(0, 9)
)
@settings(max_examples=40)
def test_every_solver_gives_an_svd(solver: Solver, shape: tuple[int, int], seed: int, rank: int) -> None:
    rows, extra = shape
    matrix = random_product((rows, rows + extra), rank, seed).dense().double()
    left, values, right = solver(matrix)
    scale = 1 + float(matrix.norm())
    torch.testing.assert_close(left * values @ right, matrix, atol=1e-9 * scale, rtol=0)
    torch.testing.assert_close(left.T @ left, torch.eye(rows, dtype=matrix.dtype), atol=1e-9, rtol=0)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), atol=1e-7 * scale, rtol=0)


def fails(matrix: Tensor) -> Svd:
    raise torch.linalg.LinAlgError(f"no convergence on {tuple(matrix.shape)}")


def gives_nan(matrix: Tensor) -> Svd:
    left, values, right = lapack_svd(matrix)
    return left, values * torch.nan, right


def gives_another_matrix(matrix: Tensor) -> Svd:
    return lapack_svd(matrix + 1)


def test_a_solver_that_does_not_converge_hands_on_to_the_next() -> None:
    matrix = random_matrix((6, 8), 2)
    for first in (fails, gives_nan):
        whole = decompose(matrix, "w", (first, jacobi_svd))
        torch.testing.assert_close(whole.at(6).dense(), matrix, atol=1e-5, rtol=0)
    with pytest.raises(CompressionError, match=r"no SVD of w\.weight converges"):
        decompose(matrix, "w.weight", (fails, gives_nan))


def test_a_solver_that_gives_a_wrong_answer_is_not_believed() -> None:
    with pytest.raises(CompressionError, match=r"w\.weight does not reproduce it"):
        decompose(random_matrix((6, 8), 2), "w.weight", (gives_another_matrix,))


@given(shapes, st.integers(1, 6), st.integers(0, 100), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_reported_error_is_the_measured_one(
    shape: tuple[int, int], rank: int, seed: int, dtype: torch.dtype
) -> None:
    matrix = random_matrix(shape, seed)
    whole = decompose(matrix, "w")
    kept = min(rank, len(whole.values))
    factors = truncated_svd(matrix, rank, dtype=dtype)
    measured = float((matrix - factors.dense()).norm())
    assert whole.norm == pytest.approx(float(matrix.norm()), rel=1e-5)
    told = (whole.lost(kept) ** 2 + rounding(whole.at(kept), factors) ** 2) ** 0.5
    assert told == pytest.approx(measured, rel=0.05, abs=1e-5)


deltas = st.sampled_from(["none", "low", "dense"])


@given(deltas, deltas, st.integers(0, 100))
def test_the_exclusive_vector_is_the_task_vector_minus_the_shared_change(
    one: str, two: str, seed: int
) -> None:
    shape = (5, 7)
    forms = {
        "none": lambda s: None,
        "low": lambda s: random_product(shape, 2, s),
        "dense": lambda s: random_matrix(shape, s),
    }
    task, shared = forms[one](seed), forms[two](seed + 50)
    exclusive = exclusive_delta(task, shared)
    if task is None and shared is None:
        assert exclusive is None
        return
    assert exclusive is not None
    assert isinstance(exclusive, LowRank) == ("dense" not in (one, two))
    zero = torch.zeros(shape)
    expected = (zero if task is None else dense(task)) - (zero if shared is None else dense(shared))
    torch.testing.assert_close(dense(exclusive), expected, atol=1e-5, rtol=1e-5)


def test_deltas_of_different_parameters_are_not_subtracted() -> None:
    with pytest.raises(CompressionError, match=r"\[2, 2\].*\[3, 3\]"):
        exclusive_delta(torch.ones(2, 2), torch.ones(3, 3))
