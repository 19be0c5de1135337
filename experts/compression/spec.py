"""How much of an exclusive vector to keep, and in which form."""

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

Codec = Literal["bfloat16", "float16", "float32", "int8", "int4", "mixed"]
Allocation = Literal["energy", "activation"]


class CompressionSpec(BaseModel):
    """Exactly one of `rank`, `energy` and `budget_bytes` says how much is kept.

    Attributes:
        rank: singular values kept of each matrix, at most.
        energy: smallest rank whose squared singular values sum to that fraction of each matrix's.
        budget_bytes: bytes of the whole expert's tensors, shared out over its matrices by singular-value
            energy per byte.
        dtype: stored form of U and Vh; S is float32. int8, int4: group-wise quantised. mixed: each singular
            value in 16, 8, 4 or 2 bits, whichever loses least under the budget, so it needs one
            (Delta-CoMe, arXiv 2406.08903; ImPart, arXiv 2504.13237). All are served as bfloat16.
        allocation: what counts as lost. "energy": the exclusive vector's own Frobenius norm. "activation": the
            outputs' error on the expert's prompts, ‖(V − V̂)·C^½‖ with C the second moments of each matrix's
            inputs (ASVD, arXiv 2312.05821; SVD-LLM, arXiv 2403.07378); it decides which directions are kept
            and how bytes and ranks are shared out.
        extras: what becomes of biases, norms, embeddings and heads. "fold": only the merge carries them,
            their exclusive part is dropped and the report says how large it was. "exact": vectors are kept
            dense in float32, embeddings and heads are factored like any matrix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    budget_bytes: int | None = Field(default=None, ge=1)
    dtype: Codec = "bfloat16"
    allocation: Allocation = "energy"
    extras: Literal["fold", "exact"] = "fold"

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.rank, self.energy, self.budget_bytes)) != 1:
            raise ValueError("give exactly one of rank, energy and budget_bytes")
        if self.dtype == "mixed" and self.budget_bytes is None:
            raise ValueError("dtype mixed chooses precisions under a byte budget; give budget_bytes")
        return self

    def resized(self, *, rank: int | None = None, energy: float | None = None) -> Self:
        """The same by rank or energy instead; mixed precision, which only a budget can share out, becomes int8.

        Raises:
            ValidationError: not exactly one of the two, or out of range.
        """
        return type(self).model_validate({
            **self.model_dump(),
            "rank": rank,
            "energy": energy,
            "budget_bytes": None,
            "dtype": "int8" if self.dtype == "mixed" else self.dtype,
        })  # fmt: skip

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of vectors that are not quantised."""
        return {"float16": torch.float16, "float32": torch.float32}.get(self.dtype, torch.bfloat16)
