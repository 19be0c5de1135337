"""Merge methods and their hyper-parameters, as they are asked for and as the manifest keeps them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Scale = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
"""λ, the weight of the merged task vector."""

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
"""Fraction of each task vector's entries that TIES keeps; the paper uses 0.2."""

DropRate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Probability p with which DARE drops an entry; the paper uses 0.5 to 0.99."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Averaging(_Method):
    """θ* = mean of the fine-tunes (Model Soups, arXiv 2203.05482)."""

    method: Literal["averaging"] = "averaging"


class TaskArithmetic(_Method):
    """θ* = θ₀ + λ Σ δ_t (arXiv 2212.04089)."""

    method: Literal["task-arithmetic"] = "task-arithmetic"
    scale: Scale = 0.3


class Ties(_Method):
    """θ* = θ₀ + λ · disjoint mean of the trimmed, sign-elected δ_t (arXiv 2306.01708)."""

    method: Literal["ties"] = "ties"
    density: Density = 0.2
    scale: Scale = 1.0


class Dare(_Method):
    """θ* = θ₀ + λ Σ DARE(δ_t): entries dropped at random, the rest rescaled (arXiv 2311.03099)."""

    method: Literal["dare"] = "dare"
    drop_rate: DropRate = 0.9
    scale: Scale = 0.3
    seed: Seed = 0


class DareTies(_Method):
    """TIES over DARE(δ_t) (arXiv 2311.03099, section 3.2)."""

    method: Literal["dare-ties"] = "dare-ties"
    drop_rate: DropRate = 0.9
    density: Density = 0.2
    scale: Scale = 1.0
    seed: Seed = 0


MergeMethod = Annotated[Averaging | TaskArithmetic | Ties | Dare | DareTies, Field(discriminator="method")]
"""Any of them, told apart by `method`."""
