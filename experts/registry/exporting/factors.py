"""What every form of a LoRA needs: the products of an expert, and what turns them back into its factors."""

from collections.abc import Mapping

import torch

from experts.bundle_expert import ExpertWeights
from experts.checkpoint.mark import Exactly
from experts.factors import LowRank, SvdFactors


def products(expert: ExpertWeights) -> dict[str, LowRank]:
    """Parameter → fl(U·S) and Vh, float32, without the directions whose value is zero; none where all are."""
    found = {name: _without_zeros(factors).low_rank() for name, factors in expert.factors.items()}
    return {name: product for name, product in found.items() if product.rank}


def exactly(expert: ExpertWeights) -> Exactly:
    """The singular values of `products`, and the dtype of the vectors."""
    kept: Mapping[str, SvdFactors] = {
        name: _without_zeros(factors) for name, factors in expert.factors.items()
    }
    dtypes = {factors.U.dtype for factors in kept.values()} or {torch.float32}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    values = {name: tuple(factors.S.tolist()) for name, factors in kept.items() if factors.rank}
    return Exactly(values, str(widest).removeprefix("torch."))


def _without_zeros(factors: SvdFactors) -> SvdFactors:
    kept = factors.S != 0
    if kept.all():
        return factors
    return SvdFactors(factors.U[:, kept], factors.S[kept], factors.Vh[kept])
