"""Merge methods and their hyper-parameters, as they are asked for and as the manifest keeps them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Scale = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
"""λ, the weight of the merged task vector."""

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
"""Fraction of entries that is kept."""

DropRate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Probability p with which an entry is dropped; drawn in steps of 2⁻¹⁶."""

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
    """θ* = θ₀ + λ · disjoint mean of the trimmed, sign-elected δ_t (arXiv 2306.01708).

    Attributes:
        density: fraction of each task vector that trimming keeps; the paper uses 0.2.
        trim: over what the fraction is taken: the whole task vector (the paper) or each tensor (mergekit).
        scale: λ.
    """

    method: Literal["ties"] = "ties"
    density: Density = 0.2
    trim: Literal["model", "tensor"] = "model"
    scale: Scale = 1.0


class Dare(_Method):
    """θ* = θ₀ + λ Σ DARE(δ_t): entries dropped at random, the rest rescaled (arXiv 2311.03099)."""

    method: Literal["dare"] = "dare"
    drop_rate: DropRate = 0.9
    scale: Scale = 0.3
    seed: Seed = 0


class DareTies(_Method):
    """TIES over DARE(δ_t) (arXiv 2311.03099, section 3.2); at density 1 nothing is trimmed, as in mergekit."""

    method: Literal["dare-ties"] = "dare-ties"
    drop_rate: DropRate = 0.9
    density: Density = 0.2
    scale: Scale = 1.0
    seed: Seed = 0


class Breadcrumbs(_Method):
    """θ* = θ₀ + λ Σ m_t ⊙ δ_t: of each tensor the largest and the small entries are masked (arXiv 2312.06795).

    Attributes:
        density: fraction of each tensor that is kept.
        outliers: fraction of each tensor, the largest magnitudes, that is masked. The defaults are the
            paper's β = 85 % and γ = 99.3 %: the lowest 85 % and the highest 0.7 % are masked.
        election: TIES' sign election and disjoint mean instead of the sum (mergekit's breadcrumbs_ties).
        scale: λ.
    """

    method: Literal["breadcrumbs"] = "breadcrumbs"
    density: Density = 0.143
    outliers: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.007
    election: bool = False
    scale: Scale = 0.3

    @field_validator("outliers")
    @classmethod
    def _room_for_both(cls, outliers: float, info: ValidationInfo) -> float:
        density = info.data.get("density")
        if density is not None and outliers + density > 1 + 1e-9:
            raise ValueError(f"density {density:g} and outliers {outliers:g} exceed the whole; lower one")
        return outliers


class Della(_Method):
    """DELLA (arXiv 2406.11617): entries dropped by their magnitude's rank in the row, then TIES' election.

    Attributes:
        drop_rate: mean probability p of dropping an entry.
        epsilon: width ε: p runs from p + ε/2 at a row's smallest entry to p − ε/2 at its largest.
            mergekit's epsilon is half of it.
        election: sign election and disjoint mean; without it the sum (mergekit's della_linear).
        scale: λ.
        seed: of the draws.
    """

    method: Literal["della"] = "della"
    drop_rate: DropRate = 0.5
    epsilon: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.2
    election: bool = True
    scale: Scale = 1.0
    seed: Seed = 0

    @field_validator("epsilon")
    @classmethod
    def _within_probabilities(cls, epsilon: float, info: ValidationInfo) -> float:
        rate = info.data.get("drop_rate")
        if rate is not None and (rate - epsilon / 2 < 0 or rate + epsilon / 2 >= 1):
            raise ValueError(
                f"drop_rate {rate:g} ± {epsilon / 2:g} leaves [0, 1); epsilon must be below "
                f"{2 * min(rate, 1 - rate):g}"
            )
        return epsilon


class Sce(_Method):
    """SCE (arXiv 2408.07990): select by variance over tasks, weigh by energy, erase minority signs.

    Attributes:
        density: fraction of each tensor's entries, those of the largest variance, that is kept.
        scale: λ; the paper has 1.
    """

    method: Literal["sce"] = "sce"
    density: Density = 0.1
    scale: Scale = 1.0


class ModelStock(_Method):
    """Model Stock (arXiv 2403.19522): θ* = θ₀ + t · mean δ_t, t from the angle between the δ_t of a tensor."""

    method: Literal["model-stock"] = "model-stock"


class TsvMerge(_Method):
    """TSV-Merge (arXiv 2412.00081): each matrix's leading singular vectors, made orthogonal over the tasks.

    Attributes:
        fraction: part of a matrix's rank that each task keeps; None for the paper's 1/T.
        scale: λ; the paper has 1.
    """

    method: Literal["tsv"] = "tsv"
    fraction: Density | None = None
    scale: Scale = 1.0


class IsoC(_Method):
    """Iso-C (arXiv 2502.04959): the summed task matrix with all its singular values at their mean."""

    method: Literal["iso-c"] = "iso-c"
    scale: Scale = 1.0


MergeMethod = Annotated[
    Averaging
    | TaskArithmetic
    | Ties
    | Dare
    | DareTies
    | Breadcrumbs
    | Della
    | Sce
    | ModelStock
    | TsvMerge
    | IsoC,
    Field(discriminator="method"),
]
"""Any of them, told apart by `method`."""
