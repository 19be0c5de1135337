"""How strongly experts' weights respond to pooled states: the scores of data-free routers, pure tensor functions.

Three papers, one quantity: SpectR's ‖ΣVᵀx‖ (arXiv 2504.03454), Arrow's |v₁ᵀx| (2405.11157) and what MASS leaves
as residual, 1 − ‖VVᵀx‖²/‖x‖² (2504.05342).
"""

from typing import Literal

import torch
from torch import Tensor

Score = Literal["spectral", "arrow", "residual"]
_LEAST = 1e-9


def energies(features: Tensor, rows: Tensor, score: Score) -> Tensor:
    """(n, experts, readings) log responses of experts to prompts.

    Args:
        features: (n, taps × parts × hidden), pooled states as `FeatureSpec` lays them out.
        rows: (experts, taps, groups, rank, hidden), see `experts.registry.responses`.
        score: which paper's.

    A reading is one tap, one pooled part of it and one group of matrices.
    """
    experts, taps, groups, _, hidden = rows.shape
    states = features.view(features.shape[0], taps, features.shape[1] // (taps * hidden), hidden)
    states = states * states.square().mean(-1, keepdim=True).clamp(min=_LEAST).rsqrt()
    if score == "arrow":
        rows = rows[..., :1, :]
    if score != "spectral":
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=_LEAST)
    # One matrix product a tap, over all its experts, groups and directions.
    found = []
    for tap in range(taps):
        flat = rows[:, tap].reshape(-1, hidden)
        answers = (states[:, tap] @ flat.T).view(
            len(states), states.shape[2], experts, groups, rows.shape[-2]
        )
        found.append(answers.square().sum(-1).transpose(1, 2).flatten(2))
    energy = torch.cat(found, dim=2)
    if score == "residual":
        return -(1 - energy / hidden).clamp(min=_LEAST).log()
    return energy.clamp(min=_LEAST).log()


def standardised(found: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, experts, readings) → (n, experts): mean z-score over the readings that vary, × √readings.

    Args:
        mean, std: (n, experts, readings) of the same scores on neutral prompts of each prompt's form.
    """
    varies = std > 1e-4
    z = torch.where(varies, (found - mean) / std.clamp(min=1e-4), 0.0).clamp(-8, 8)
    count = varies.sum(2).clamp(min=1)
    summed: Tensor = z.sum(2) / count.sqrt()
    return summed
