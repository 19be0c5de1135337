"""Vectors in a few bits: group-wise uniform quantisation, packed into bytes.

A group of consecutive entries shares one float16 scale s; an entry is stored as one of 2^bits codes c and
stands for (c − (2^bits − 1)/2)·s. The levels are symmetric about zero, and no code is wasted. The scale of a
group is the one of a few that loses least (squared error), as rounding the largest entry to the outermost
level is far from the best below 8 bits.

The code widths are for singular vectors as in Delta-CoMe (arXiv 2406.08903) and ImPart (arXiv 2504.13237).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from experts.errors import CompressionError

Bits = Literal[8, 4, 2]
BITS: tuple[Bits, ...] = (8, 4, 2)

GROUP: dict[Bits, int | None] = {8: None, 4: 64, 2: 128}
"""Entries that share a scale; None: the whole vector. The best error per byte on LoRA experts."""

_SHRINKS: dict[Bits, tuple[float, float, int]] = {8: (1.0, 1.0, 1), 4: (0.55, 1.0, 10), 2: (0.3, 1.0, 15)}
"""Scales tried, as part of the one that reaches the largest entry: from, to, how many."""


def packed_width(length: int, bits: Bits) -> int:
    """Bytes of the packed codes of a vector."""
    return -(-length * bits // 8)


def groups_of(length: int, bits: Bits) -> int:
    """Scales of a vector."""
    group = GROUP[bits] or length
    return -(-length // group) if length else 0


def vector_nbytes(length: int, bits: Bits) -> int:
    """Stored bytes of one quantised vector, scales included."""
    return packed_width(length, bits) + 2 * groups_of(length, bits)


def quantise(vectors: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix to codes.

    Args:
        vectors: (k, n) floating point, finite, below float16's largest number.
        bits: width of a code.

    Returns:
        Packed codes (k, packed_width(n)) uint8 and scales (k, groups_of(n)) float16.

    Raises:
        CompressionError: not a matrix, NaN or Inf, or entries too large for float16 scales.
    """
    if vectors.ndim != 2:
        raise CompressionError(f"only the rows of a matrix can be quantised, not shape {list(vectors.shape)}")
    if not torch.isfinite(vectors).all():
        raise CompressionError("vectors to quantise have NaN or Inf; train the fine-tune again")
    rows, length = vectors.shape
    if not rows or not length:
        return (
            torch.zeros(rows, packed_width(length, bits), dtype=torch.uint8),
            torch.zeros(rows, groups_of(length, bits), dtype=torch.float16),
        )
    grouped = _grouped(vectors.to(torch.float32), bits)
    real = _grouped(torch.ones(1, length), bits)
    half, top = _middle(bits), torch.finfo(torch.float16).max
    reach = grouped.abs().amax(dim=-1, keepdim=True) / half
    if float(reach.max()) > top:
        raise CompressionError(f"vectors to quantise exceed {top * half:g}; scale them down")
    low, high, count = _SHRINKS[bits]
    scales = reach.to(torch.float16).to(torch.float32)
    codes, error = _rounded(grouped, real, scales, bits)
    for shrink in torch.linspace(high, low, count).tolist()[1:]:
        tried = (reach * shrink).to(torch.float16).to(torch.float32)
        rounded, lost = _rounded(grouped, real, tried, bits)
        better = lost < error
        scales, codes = torch.where(better, tried, scales), torch.where(better, rounded, codes)
        error = torch.minimum(lost, error)
    flat = codes.reshape(rows, -1)[:, :length].to(torch.uint8)
    return _pack(flat, bits), scales.squeeze(-1).to(torch.float16)


def dequantise(packed: Tensor, scales: Tensor, length: int, bits: Bits) -> Tensor:
    """The vectors that codes and scales stand for, (k, length) float32.

    Raises:
        CompressionError: the shapes are not those of `length` entries.
    """
    expected = (packed_width(length, bits), groups_of(length, bits))
    if packed.ndim != 2 or scales.ndim != 2 or (packed.shape[1], scales.shape[1]) != expected:
        raise CompressionError(
            f"codes {list(packed.shape)} and scales {list(scales.shape)} do not hold vectors of {length} "
            f"entries in {bits} bits, which take {expected[0]} bytes and {expected[1]} scales"
        )
    if not packed.numel():
        return torch.zeros(packed.shape[0], length)
    codes = _unpack(packed, length, bits).to(torch.float32)
    spread = scales.to(torch.float32).repeat_interleave(GROUP[bits] or max(length, 1), dim=1)[:, :length]
    return (codes - _middle(bits)) * spread


def _middle(bits: Bits) -> float:
    """The code that would stand for zero; also the outermost level, in scales."""
    return (2**bits - 1) / 2


def _grouped(vectors: Tensor, bits: Bits) -> Tensor:
    """(k, n) → (k, groups, group), the last group filled with zeros."""
    length = vectors.shape[1]
    group = GROUP[bits] or length
    return functional.pad(vectors, (0, -length % group)).view(vectors.shape[0], -1, group)


def _rounded(grouped: Tensor, real: Tensor, scales: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Nearest codes, float32, and what they lose of the real entries of each group (squared)."""
    steps = torch.where(scales > 0, grouped / torch.where(scales > 0, scales, 1.0), 0.0)
    codes = (steps + _middle(bits)).round().clamp(0, 2**bits - 1)
    lost = ((codes - _middle(bits)) * scales - grouped) * real
    return codes, lost.square().sum(dim=-1, keepdim=True)


def _pack(codes: Tensor, bits: Bits) -> Tensor:
    """(k, n) codes → (k, bytes), the first of a byte in its lowest bits."""
    many = 8 // bits
    filled = functional.pad(codes, (0, -codes.shape[1] % many)).view(codes.shape[0], -1, many)
    packed = torch.zeros(filled.shape[:2], dtype=torch.uint8)
    for place in range(many):
        packed |= filled[:, :, place] << (place * bits)
    return packed


def _unpack(packed: Tensor, length: int, bits: Bits) -> Tensor:
    """The inverse of `_pack`."""
    if bits == 8:
        return packed[:, :length]
    mask = 2**bits - 1
    parts = [(packed >> (place * bits)) & mask for place in range(8 // bits)]
    return torch.stack(parts, dim=-1).reshape(packed.shape[0], -1)[:, :length]
