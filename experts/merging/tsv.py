"""TSV-Merge (arXiv 2412.00081, algorithm 1): task singular vectors, freed of their interference."""

from collections.abc import Sequence

import torch

from experts.factors import Delta, LowRank
from experts.merging.spectrum import orthogonalised, spectrum


def tsv(deltas: Sequence[Delta], rank: int, scale: float) -> LowRank:
    """λ·U⊥·Σ·V⊥ᵀ: the tasks' truncated SVDs side by side, U and V each made orthogonal as a whole.

    Singular vectors of zero singular values are left out: a dense SVD of a matrix of low rank would make
    them up, and orthogonalising would then mix them into the true ones.

    Args:
        deltas: one matrix of each fine-tune that touches it, all (rows, columns), finite.
        rank: singular values kept of each; the paper's is min(rows, columns) / T.
        scale: λ.

    Returns:
        θ* − θ₀, of rank len(deltas)·rank at most, float32.
    """
    parts = [spectrum(delta).leading(rank) for delta in deltas]
    left = orthogonalised(torch.cat([part.left for part in parts], dim=1))
    right = orthogonalised(torch.cat([part.right for part in parts], dim=0).T)
    values = torch.cat([part.values for part in parts])
    return LowRank((left * (values * scale)).to(torch.float32), right.T.to(torch.float32).contiguous())
