import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.compression.codec import (
    BITS,
    GROUP,
    Bits,
    dequantise,
    groups_of,
    packed_width,
    quantise,
    vector_nbytes,
)
from experts.compression.precision import RESIDUAL, ladder
from experts.compression.stored import complete, encode, from_tensors, problem, value_nbytes
from experts.compression.svd import decompose, rounding
from experts.errors import CompressionError

bits_of_a_code = st.sampled_from(BITS)


def vectors(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (torch.rand(rows, 1, generator=generator) * 6 - 4)
    return torch.randn(rows, length, generator=generator) * scales


def spacing(largest: Tensor, bits: Bits) -> Tensor:
    """Half the distance of two levels, with the float16 rounding of the scale."""
    return largest / (2**bits - 1) * (1 + 2**-10) + 2**-24


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 1000), bits_of_a_code)
@settings(max_examples=60, deadline=None)
def test_no_group_loses_more_than_rounding_every_entry_by_half_a_step(
    rows: int, length: int, seed: int, bits: Bits
) -> None:
    before = vectors(rows, length, seed)
    packed, scales = quantise(before, bits)
    after = dequantise(packed, scales, length, bits)
    group = GROUP[bits] or length
    for start in range(0, length, group):
        part, lost = before[:, start : start + group], (before - after)[:, start : start + group]
        half = spacing(part.abs().amax(dim=1), bits)
        # The reaching scale is rounded to float16, and so can fall short of the largest entry by as much.
        half = half + part.abs().amax(dim=1) * 2**-10 + 2 ** (bits - 25)
        assert (lost.square().sum(dim=1) <= part.shape[1] * half.square() * 1.001).all()


@given(st.integers(0, 4), st.integers(0, 300), bits_of_a_code)
@settings(max_examples=60, deadline=None)
def test_byte_counts_are_those_of_the_tensors(rows: int, length: int, bits: Bits) -> None:
    packed, scales = quantise(torch.ones(rows, length), bits)
    assert (packed.dtype, scales.dtype) == (torch.uint8, torch.float16)
    assert packed.shape == (rows, packed_width(length, bits))
    assert scales.shape == (rows, groups_of(length, bits))
    assert packed.nbytes + scales.nbytes == rows * vector_nbytes(length, bits)
    assert dequantise(packed, scales, length, bits).shape == (rows, length)


@given(st.integers(1, 200), st.integers(0, 100), bits_of_a_code)
@settings(max_examples=30, deadline=None)
def test_values_that_are_levels_come_back_as_they_were(length: int, seed: int, bits: Bits) -> None:
    levels = torch.randint(0, 2**bits, (3, length), generator=torch.Generator().manual_seed(seed))
    levels[:, :: GROUP[bits] or length] = 0  # every group reaches the outermost level
    before = (levels - (2**bits - 1) / 2) * 0.25
    torch.testing.assert_close(dequantise(*quantise(before, bits), length, bits), before, atol=0, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros_and_signs_stay_signs(bits: Bits) -> None:
    before = torch.stack([torch.zeros(70), torch.cat([torch.full((40,), -2.0), torch.full((30,), 2.0)])])
    after = dequantise(*quantise(before, bits), 70, bits)
    assert not after[0].any()
    torch.testing.assert_close(after[1], before[1], atol=0, rtol=2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_the_residuals_that_allocation_reckons_with_are_about_those_of_random_vectors(bits: Bits) -> None:
    left, right = (torch.linalg.qr(torch.randn(size, 8)).Q.T for size in (576, 1536))
    whole = left.T @ right
    rounded = dequantise(*quantise(left, bits), 576, bits).T @ dequantise(*quantise(right, bits), 1536, bits)
    lost = float((whole - rounded).square().sum() / whole.square().sum())
    assert RESIDUAL[bits] / 2 < lost < RESIDUAL[bits] * 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_quantised(value: float) -> None:
    broken = torch.ones(2, 5)
    broken[1, 3] = value
    with pytest.raises(CompressionError, match="NaN or Inf"):
        quantise(broken, 8)


def test_shapes_and_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"shape \[3\]"):
        quantise(torch.ones(3), 4)
    with pytest.raises(CompressionError, match="scale them down"):
        quantise(torch.full((1, 4), 1e9), 8)
    packed, scales = quantise(torch.ones(2, 130), 4)
    with pytest.raises(CompressionError, match="33 bytes and 2 scales"):
        dequantise(packed, scales, 66, 4)


counts = st.fixed_dictionaries({bits: st.integers(0, 2) for bits in (16, *BITS)})


@given(counts, st.integers(8, 40), st.integers(8, 40), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_factors_come_back_from_their_stored_tensors_whatever_the_mixture(
    counts: dict[int, int], rows: int, columns: int, seed: int
) -> None:
    rank = sum(counts.values())
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    best = decompose(matrix, "w").at(rank)
    stored = encode(best, counts)
    if rank:
        assert stored.nbytes == sum(n * value_nbytes((rows, columns), bits) for bits, n in counts.items())
    tensors = stored.tensors()
    assert stored.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert complete(set(tensors))
    again = from_tensors(tensors, (rows, columns)).decoded()
    assert again.shape == (rows, columns)
    assert (again.rank, again.U.dtype, again.Vh.dtype) == (rank, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(again.dense(), stored.decoded().dense(), atol=0, rtol=0)
    # No worse than if everything had the narrowest code, and that code's usual loss many times over.
    assert rounding(best, again) <= 0.9 * float(best.S.norm()) + 1e-6


def test_a_wider_code_loses_less() -> None:
    best = decompose(torch.randn(96, 64, generator=torch.Generator().manual_seed(3)), "w").at(8)
    lost = [rounding(best, encode(best, {bits: 8}).decoded()) for bits in (2, 4, 8, 16)]
    assert lost == sorted(lost, reverse=True)


def test_what_does_not_fit_a_matrix_is_told() -> None:
    best = decompose(torch.randn(12, 10), "w").at(4)
    tensors = encode(best, {8: 2, 4: 2}).tensors()
    names = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}

    def told(change: dict[str, Tensor], expected: tuple[int, ...] = (12, 10)) -> str | None:
        changed = tensors | change
        return problem(
            {part: tuple(tensor.shape) for part, tensor in changed.items()},
            {part: names[tensor.dtype] for part, tensor in changed.items()},
            expected,
        )

    assert told({}) is None
    assert "do not make (13, 11)" in str(told({}, (13, 11)))
    assert "of a matrix" in str(told({}, (12,)))
    assert "do not multiply" in str(told({"S": torch.ones(3)}))
    assert "S must be F32" in str(told({"S": torch.ones(4).half()}))
    assert "not U8 and F16" in str(told({"s8": tensors["s8"].float()}))
    assert not complete({"S", "q8"})
    assert not complete({"q8", "s8"})
    assert not complete({"S"})


@pytest.mark.parametrize("shape", [(6, 6), (576, 1536), (49152, 576), (1, 1), (9, 2000)])
def test_every_rung_of_a_ladder_gains_less_per_byte_than_the_one_below(shape: tuple[int, int]) -> None:
    rungs = ladder(shape, (2, 4, 8, 16))
    worth = [rung.gain / rung.nbytes for rung in rungs]
    assert worth == sorted(worth, reverse=True)
    assert rungs[-1].bits == 16
    assert sum(rung.nbytes for rung in rungs) == value_nbytes(shape, 16)
    assert sum(rung.gain for rung in rungs) == pytest.approx(1 - RESIDUAL[16])
