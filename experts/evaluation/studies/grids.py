"""The hyper-parameters tried for each static merge; validation chooses, and tables print the choice."""

from experts.errors import MergeError
from experts.merging import (
    Averaging,
    Breadcrumbs,
    Dare,
    DareTies,
    Della,
    IsoC,
    MergeMethod,
    ModelStock,
    Sce,
    TaskArithmetic,
    Ties,
    TsvMerge,
)

METHODS = (
    "averaging",
    "task-arithmetic",
    "ties",
    "dare",
    "dare-ties",
    "breadcrumbs",
    "della",
    "sce",
    "tsv",
    "iso-c",
    "model-stock",
)

_SUMS = (0.2, 0.3, 0.5, 0.8)
"""λ of methods that add task vectors up."""
_MEANS = (0.5, 1.0, 1.5, 2.0)
"""λ of methods whose result is of the size of one task vector."""


def grid(method: str, seed: int = 0) -> tuple[MergeMethod, ...]:
    """What is tried of a method; `seed` is that of the random ones.

    Raises:
        MergeError: no such method.
    """
    match method:
        case "averaging":
            return (Averaging(),)
        case "model-stock":
            return (ModelStock(),)
        case "task-arithmetic":
            return tuple(TaskArithmetic(scale=scale) for scale in _SUMS)
        case "dare":
            return tuple(Dare(drop_rate=0.5, scale=scale, seed=seed) for scale in _SUMS)
        case "breadcrumbs":
            return tuple(Breadcrumbs(scale=scale) for scale in (*_SUMS, 1.2))
        case "ties":
            return tuple(Ties(scale=scale) for scale in _MEANS)
        case "dare-ties":
            return tuple(DareTies(drop_rate=0.5, scale=scale, seed=seed) for scale in _MEANS)
        case "della":
            return tuple(Della(scale=scale, seed=seed) for scale in _MEANS)
        case "sce":
            return tuple(Sce(scale=scale) for scale in _MEANS)
        case "tsv":
            return tuple(TsvMerge(scale=scale) for scale in _MEANS)
        case "iso-c":
            return tuple(IsoC(scale=scale) for scale in _MEANS)
    raise MergeError(f"there is no grid for {method!r}; choose among {', '.join(METHODS)}")
