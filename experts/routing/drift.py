"""How far prompts are from those that a router was fitted on: distances by its guard, and what it expects."""

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.routing.features import narrowed
from experts.routing.guard import Guard, Guarded
from experts.routing.router import Router
from experts.routing.staged import StagedRouter
from experts.routing.subspace import SubspaceRouter


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a router says of the held-out prompts of its fit.

    Attributes:
        accuracy: share that went to their own expert; its mean confidence on such prompts, as it is calibrated.
        abstention: share that it was to leave to the shared expert.
        threshold: the distance from which on it does.
    """

    accuracy: float | None = None
    abstention: float | None = None
    threshold: float | None = None


@torch.inference_mode()
def distance(router: Router, features: Tensor) -> float | None:
    """How unlike the held-out prompts of a router's experts a prompt is, in spreads from their median.

    Half of those prompts lie below 0, and 5 % above 1.

    Args:
        features: (d,) float32 by the router's spec; NaN in layers that were not read.

    Returns:
        None where the router has no such statistics, or what they need was not read.
    """
    rows = features[None].to(device="cpu", dtype=torch.float32)
    if isinstance(router, StagedRouter):
        inner = router.coarse if bool(rows.isnan().any()) else router.fine
        return distance(inner, narrowed(rows, router.spec, inner.spec)[0])
    if isinstance(router, SubspaceRouter):
        known = router.known
        return None if known is None else distance(known, narrowed(rows, router.spec, known.spec)[0])
    guard = _guard(router)
    if guard is None or bool(rows.isnan().any()):
        return None
    return float(guard.scores(rows)[0])


def fitted(router: Router) -> Fitted:
    """What a router expects of prompts like those that it was fitted on."""
    inner = router
    if isinstance(inner, SubspaceRouter) and inner.known is not None:
        inner = inner.known
    accuracy = inner.describe().get("validation_accuracy")
    guard = _guard(inner.fine if isinstance(inner, StagedRouter) else inner)
    return Fitted(
        accuracy=float(accuracy) if isinstance(accuracy, int | float) else None,
        abstention=None if guard is None else guard.rate,
        threshold=None if guard is None else guard.threshold,
    )


def _guard(router: Router) -> Guard | None:
    return router.guard if isinstance(router, Guarded) else None
