"""When a cheap router's word may stand for a dear one's: the confidence that costs no accuracy on validation."""

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

NEVER = 2.0
"""A certainty that no confidence reaches: the fine stage answers everything."""


class StageRecord(BaseModel):
    """How the stages did on the validation features by which the certainty was set.

    Attributes:
        settled: share of them that the coarse stage settles.
        coarse, fine, staged: share that the stage alone, and both together, send to their own expert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: int
    settled: float
    coarse: float
    fine: float
    staged: float


def certain_from(
    coarse: Tensor, fine: Tensor, labels: Tensor, *, margin: float = 0.25, tolerance: float = 0.0
) -> float:
    """The confidence from which on a coarse router's answers may stand for a fine one's.

    It is the smallest at which the coarse one is right as often as the fine one on the rows that reach it,
    moved up by `margin` of what it lacks to 1, since it was picked on these very rows; `NEVER` if there is none.

    Args:
        coarse, fine: (n, experts) calibrated probabilities of the same validation rows.
        labels: (n,) int64.
        tolerance: right answers that may be lost, as a share of n.
    """
    confidence, order = coarse.max(1).values.to(torch.float64).sort(descending=True)
    lost = (fine.argmax(1) == labels).to(torch.int64) - (coarse.argmax(1) == labels).to(torch.int64)
    lost_so_far = lost[order].cumsum(0)
    # Rows of equal confidence are settled together: a cut may only stand behind the last of them.
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = confidence[:-1] > confidence[1:]
    good = (last & (lost_so_far <= tolerance * len(order))).nonzero()
    if not len(good):
        return NEVER
    least = float(confidence[int(good[-1])])
    return least + margin * (1 - least)


def compared(coarse: Tensor, fine: Tensor, labels: Tensor, certainty: float) -> StageRecord:
    """How two stages do on (n, experts) probabilities and (n,) labels; the coarse one answers from `certainty` on."""
    right, right_fine = coarse.argmax(1) == labels, fine.argmax(1) == labels
    certain = coarse.max(1).values >= certainty
    settled, *shares = (
        float(rows.to(torch.float64).mean())
        for rows in (certain, right, right_fine, torch.where(certain, right, right_fine))
    )
    return StageRecord(
        features=len(labels), settled=settled, coarse=shares[0], fine=shares[1], staged=shares[2]
    )
