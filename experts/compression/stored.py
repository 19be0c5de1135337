"""Factors as they are stored: runs of singular values, each run in its own precision.

One run in 16 or 32 bits is the plain form, two tensors U and Vh. A quantised run is two tensors as well: a
row holds the codes of a left singular vector and behind them those of its right one; so for their scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.compression.codec import BITS, Bits, dequantise, groups_of, packed_width, quantise, vector_nbytes
from experts.factors import SvdFactors

DECODED = torch.bfloat16
"""What quantised factors become in memory."""

_PLAIN = {"BF16", "F16", "F32"}


@dataclass(frozen=True, slots=True)
class PlainRun:
    """Singular vectors in 16 or 32 bits.

    Attributes:
        U: (rows, k).
        Vh: (k, columns), the same dtype.
    """

    U: Tensor
    Vh: Tensor


@dataclass(frozen=True, slots=True)
class QuantisedRun:
    """Singular vectors in 8 bits or fewer.

    Attributes:
        codes: (k, bytes of a left vector + bytes of a right one) uint8.
        scales: (k, groups of a left vector + groups of a right one) float16.
    """

    bits: Bits
    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class StoredFactors:
    """One matrix's truncated SVD in its stored form.

    Attributes:
        shape: (rows, columns) of the product.
        S: (k,) float32, descending: first those of `plain`, then those of each run.
        plain: None where all is quantised.
        runs: from the widest code to the narrowest.
    """

    shape: tuple[int, int]
    S: Tensor
    plain: PlainRun | None
    runs: tuple[QuantisedRun, ...]

    @property
    def rank(self) -> int:
        """Number of kept singular values."""
        return self.S.shape[0]

    @property
    def nbytes(self) -> int:
        """True stored bytes of all tensors, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor, by the last part of its name in a file."""
        found = {"S": self.S}
        if self.plain is not None:
            found |= {"U": self.plain.U, "Vh": self.plain.Vh}
        for run in self.runs:
            found |= {f"q{run.bits}": run.codes, f"s{run.bits}": run.scales}
        return {part: tensor.contiguous() for part, tensor in found.items()}

    def decoded(self) -> SvdFactors:
        """The factors as they are served; what is plain stays as it is stored."""
        if not self.runs and self.plain is not None:
            return SvdFactors(self.plain.U, self.S, self.plain.Vh)
        rows, columns = self.shape
        left, right = [], []
        if self.plain is not None:
            left, right = [self.plain.U.T.to(DECODED)], [self.plain.Vh.to(DECODED)]
        for run in self.runs:
            cut, mid = packed_width(rows, run.bits), groups_of(rows, run.bits)
            left.append(dequantise(run.codes[:, :cut], run.scales[:, :mid], rows, run.bits).to(DECODED))
            right.append(dequantise(run.codes[:, cut:], run.scales[:, mid:], columns, run.bits).to(DECODED))
        return SvdFactors(torch.cat(left).T.contiguous(), self.S, torch.cat(right))


def encode(factors: SvdFactors, counts: Mapping[int, int], plain: torch.dtype = DECODED) -> StoredFactors:
    """Store the first singular values in the widest form asked for, the next in the next narrower.

    Args:
        factors: float32, S descending.
        counts: how many of them in 16 (or more), 8, 4 and 2 bits; the sum is their rank.
        plain: dtype of those that are not quantised.

    Raises:
        CompressionError: NaN or Inf in what is to be quantised.
    """
    start = max((count for bits, count in counts.items() if bits >= 16), default=0)
    whole = PlainRun(factors.U[:, :start].to(plain).contiguous(), factors.Vh[:start].to(plain).contiguous())
    runs = []
    end = start
    for bits in BITS:
        count = counts.get(bits, 0)
        if count:
            left, right = factors.U[:, end : end + count].T, factors.Vh[end : end + count]
            codes, scales = zip(quantise(left, bits), quantise(right, bits), strict=True)
            runs.append(QuantisedRun(bits, torch.cat(codes, dim=1), torch.cat(scales, dim=1)))
        end += count
    return StoredFactors(
        factors.shape,
        factors.S[:end].to(torch.float32).contiguous(),
        whole if start or not runs else None,
        tuple(runs),
    )


def value_nbytes(shape: tuple[int, int], bits: int) -> int:
    """Stored bytes of one singular value with its two vectors in that many bits."""
    quantised = next((known for known in BITS if known == bits), None)
    if quantised is None:
        return sum(shape) * bits // 8 + torch.float32.itemsize
    return sum(vector_nbytes(length, quantised) for length in shape) + torch.float32.itemsize


def from_tensors(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> StoredFactors:
    """The inverse of `StoredFactors.tensors`, for tensors that `problem` found nothing wrong with."""
    plain = PlainRun(parts["U"], parts["Vh"]) if "U" in parts else None
    runs = tuple(
        QuantisedRun(bits, parts[f"q{bits}"], parts[f"s{bits}"]) for bits in BITS if f"q{bits}" in parts
    )
    return StoredFactors(shape, parts["S"], plain, runs)


PARTS = frozenset({"U", "S", "Vh", *(f"{kind}{bits}" for bits in BITS for kind in "qs")})
"""Every name that a stored tensor can end in."""


def complete(parts: set[str]) -> bool:
    """Whether these tensors can be one matrix's factors: S, and pairs of which no half is missing."""
    pairs = [{"U", "Vh"}, *({f"q{bits}", f"s{bits}"} for bits in BITS)]
    present = [pair for pair in pairs if pair & parts]
    return bool(present) and parts == {"S"}.union(*present)


def problem(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], expected: tuple[int, ...]
) -> str | None:
    """What is wrong with one matrix's stored tensors, if anything; dtypes as safetensors names them."""
    if len(expected) != 2:
        return f"factors of a matrix, and the shared expert has shape {expected}"
    S = shapes["S"]
    if len(S) != 1:
        return f"singular values have shape {S}; S has one dimension"
    held = 0
    if "U" in shapes:
        U, Vh = shapes["U"], shapes["Vh"]
        if len(U) != 2 or len(Vh) != 2 or U[1] != Vh[0]:
            return f"factors have shapes U {U}, S {S}, Vh {Vh}, which do not multiply"
        if (U[0], Vh[1]) != expected:
            return f"factors make {(U[0], Vh[1])}, the shared expert has {expected}"
        if dtypes["U"] != dtypes["Vh"] or dtypes["U"] not in _PLAIN or dtypes["S"] != "F32":
            found = f"U {dtypes['U']}, S {dtypes['S']}, Vh {dtypes['Vh']}"
            return f"factors are {found}; U and Vh must agree in BF16, F16 or F32 and S be F32"
        held = U[1]
    for bits in BITS:
        if f"q{bits}" not in shapes:
            continue
        codes, scales = shapes[f"q{bits}"], shapes[f"s{bits}"]
        widths = (
            sum(packed_width(length, bits) for length in expected),
            sum(groups_of(length, bits) for length in expected),
        )
        if len(codes) != 2 or codes != (codes[0], widths[0]) or scales != (codes[0], widths[1]):
            return (
                f"{bits}-bit codes {codes} and scales {scales} do not make {expected}; a singular value takes "
                f"{widths[0]} bytes and {widths[1]} scales"
            )
        if (dtypes[f"q{bits}"], dtypes[f"s{bits}"]) != ("U8", "F16"):
            return (
                f"{bits}-bit codes are {dtypes[f'q{bits}']} and scales {dtypes[f's{bits}']}, not U8 and F16"
            )
        if dtypes["S"] != "F32":
            return f"singular values are {dtypes['S']}; S must be F32"
        held += codes[0]
    if held != S[0]:
        return f"S has {S[0]} singular values and the vectors are of {held}; they do not multiply"
    if S[0] < 1 or S[0] > min(expected):
        return f"rank {S[0]} is outside 1..{min(expected)}"
    return None
