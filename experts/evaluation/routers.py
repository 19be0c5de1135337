"""Fit a router for a set of experts and choose gates for requests of unknown task."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from experts.evaluation.systems import RouterPlan
from experts.registry.fitting import fit_router
from experts.routing import FeatureSpec, Router, judged, select_gates


def feature_spec(plan: RouterPlan, layer: int) -> FeatureSpec:
    """What the router reads; `layer` where the plan names none."""
    return FeatureSpec(layer=layer if plan.layer is None else plan.layer, taps=plan.taps)


def router_of(
    plan: RouterPlan, training: Mapping[str, Tensor], validation: Mapping[str, Tensor], spec: FeatureSpec
) -> Router:
    """A router of the plan's kind, fitted on expert → features (n, d)."""
    return fit_router(
        plan.router,
        training,
        validation,
        spec,
        top_k=plan.top_k,
        threshold=plan.threshold,
        seed=plan.seed,
        guard_rate=plan.guard,
    )


def choose_gates(
    router: Router, features: Tensor, plan: RouterPlan, experts: Sequence[str]
) -> tuple[Tensor, list[str | None]]:
    """Gates (n, experts) float32 and each row's leading expert; None where the router abstains."""
    found, silent = judged(router, features)
    gates = torch.zeros(len(features), len(experts))
    first: list[str | None] = []
    for row, probabilities in enumerate(found):
        if silent[row]:
            first.append(None)
            continue
        chosen = select_gates(probabilities, router.names, plan.top_k, plan.threshold)
        first.append(next(iter(chosen), None))
        for name, weight in chosen.items():
            gates[row, experts.index(name)] = weight
    return gates, first
