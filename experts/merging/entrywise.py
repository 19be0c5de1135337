"""The methods that work entry by entry, or row by row, over blocks of a parameter."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experts.factors import Delta
from experts.merging.blocks import as_rows, stacks
from experts.merging.breadcrumbs import breadcrumbs
from experts.merging.dare import dare
from experts.merging.della import magprune
from experts.merging.draws import Draws
from experts.merging.family import Family
from experts.merging.methods import Breadcrumbs, Dare, DareTies, Della, Sce, Ties
from experts.merging.sce import energies, erase, select, shares, variance, variance_threshold
from experts.merging.ties import disjoint_mean, elect_signs, trim

Entrywise = Ties | Dare | DareTies | Breadcrumbs | Della | Sce

Sparsify = Callable[[int, Tensor], Tensor]
"""(task, its next rows) → the rows with some entries zeroed."""


def merge_entries(
    family: Family,
    changes: Sequence[Delta | None],
    thresholds: Sequence[float],
    method: Entrywise,
    name: str,
    shape: tuple[int, ...],
) -> Tensor:
    """One parameter merged.

    Args:
        family: for the fine-tunes' names and the thresholds of single tensors.
        changes: of the parameter, float32.
        thresholds: of the whole task vectors, for the methods that trim those.
        method: with its hyper-parameters.
        name: the parameter's.
        shape: the parameter's.

    Returns:
        θ* − θ₀, float32.
    """
    match method:
        case Ties():
            if method.trim == "tensor":
                thresholds = family.tensor_thresholds(changes, name, method.density)
            bounds = list(thresholds)
            return _elected(changes, shape, lambda task, rows: trim(rows, bounds[task]), method.scale)
        case Dare():
            return _summed(changes, shape, _dropped(family, method, name), method.scale)
        case DareTies():
            dropped, bounds = _dropped(family, method, name), list(thresholds)
            return _elected(
                changes, shape, lambda task, rows: trim(dropped(task, rows), bounds[task]), method.scale
            )
        case Breadcrumbs():
            kept = family.breadcrumb_bounds(changes, name, method)
            combine = _elected if method.election else _summed
            return combine(changes, shape, lambda task, rows: breadcrumbs(rows, *kept[task]), method.scale)
        case Della():
            draws = [Draws(method.seed, fine_tune.name, name) for fine_tune in family.fine_tunes]
            combine = _elected if method.election else _summed
            return combine(
                changes,
                shape,
                lambda task, rows: magprune(rows, method.drop_rate, method.epsilon, draws[task]),
                method.scale,
            )
        case Sce():
            return _sce(changes, shape, method)


def _dropped(family: Family, method: Dare | DareTies, name: str) -> Sparsify:
    draws = [Draws(method.seed, fine_tune.name, name) for fine_tune in family.fine_tunes]
    return lambda task, rows: dare(rows, method.drop_rate, draws[task])


def _summed(
    changes: Sequence[Delta | None], shape: tuple[int, ...], sparsify: Sparsify, scale: float
) -> Tensor:
    """λ Σ of the sparsified changes."""
    result = torch.zeros(as_rows(shape))
    for rows, stack in stacks(changes, shape):
        block = result[rows]
        for task, change in enumerate(changes):
            if change is not None:
                block.add_(sparsify(task, stack[task]))
        block.mul_(scale)
    return result.view(shape)


def _elected(
    changes: Sequence[Delta | None], shape: tuple[int, ...], sparsify: Sparsify, scale: float
) -> Tensor:
    """λ times the disjoint mean of the sparsified changes."""
    result = torch.empty(as_rows(shape))
    for rows, stack in stacks(changes, shape):
        sparse = torch.stack(
            [
                part if change is None else sparsify(task, part)
                for task, (part, change) in enumerate(zip(stack, changes, strict=True))
            ]
        )
        torch.mul(disjoint_mean(sparse, elect_signs(sparse)), scale, out=result[rows])
    return result.view(shape)


def _sce(changes: Sequence[Delta | None], shape: tuple[int, ...], method: Sce) -> Tensor:
    """`sce.sce` in three passes over blocks."""
    variances = torch.empty(as_rows(shape))
    threshold = 0.0
    if method.density < 1 and len(changes) > 1:
        for rows, stack in stacks(changes, shape):
            variances[rows] = variance(stack)
        threshold = variance_threshold(variances, method.density)
    squares = torch.zeros(len(changes), dtype=torch.float64)
    for rows, stack in stacks(changes, shape):
        squares += energies(select(stack, variances[rows], threshold))
    weights = shares(squares)
    result = torch.empty(as_rows(shape))
    for rows, stack in stacks(changes, shape):
        selected = select(stack, variances[rows], threshold)
        torch.mul(erase(selected, weights), method.scale, out=result[rows])
    return result.view(shape)
