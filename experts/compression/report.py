"""What compression did to each tensor and to all: true bytes and relative errors. JSON-able."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Handling = Literal["factored", "exact", "folded"]


class TensorReport(BaseModel):
    """One tensor of the exclusive vector.

    Attributes:
        rank: singular values kept; 0 where it is not factored.
        nbytes: stored bytes.
        norm: Frobenius norm of the exclusive part before compression.
        error: Frobenius norm of what was lost, storage rounding included; equals `norm` where folded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...]
    handling: Handling
    rank: int
    nbytes: int
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """`error` over `norm`; 0 where there was nothing to keep."""
        return self.error / self.norm if self.norm else 0.0


class CompressionReport(BaseModel):
    """All tensors of one compressed expert.

    Attributes:
        model_nbytes: bytes of a full model, for `fraction`; None where it was not given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: tuple[TensorReport, ...]
    model_nbytes: int | None = None

    @property
    def nbytes(self) -> int:
        """True bytes of the expert's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def fraction(self) -> float | None:
        """`nbytes` over a full model's bytes."""
        return self.nbytes / self.model_nbytes if self.model_nbytes else None

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole exclusive vector, folded tensors included."""
        return float(sum(tensor.norm**2 for tensor in self.tensors) ** 0.5)

    @property
    def relative_error(self) -> float:
        """Frobenius error over Frobenius norm of the whole exclusive vector, folded tensors included."""
        return _ratio(self.tensors)

    @property
    def kept_relative_error(self) -> float:
        """The same over the tensors that were kept, without the folded ones."""
        return _ratio(tuple(tensor for tensor in self.tensors if tensor.handling != "folded"))

    @property
    def folded_fraction(self) -> float:
        """Share of the exclusive vector's squared norm that folded tensors held and the expert lacks."""
        whole = sum(tensor.norm**2 for tensor in self.tensors)
        folded = sum(tensor.norm**2 for tensor in self.tensors if tensor.handling == "folded")
        return folded / whole if whole else 0.0

    @property
    def max_rank(self) -> int:
        """Largest rank of any tensor; 0 where nothing is factored."""
        return max((tensor.rank for tensor in self.tensors), default=0)


def _ratio(tensors: tuple[TensorReport, ...]) -> float:
    norm = sum(tensor.norm**2 for tensor in tensors)
    return float((sum(tensor.error**2 for tensor in tensors) / norm) ** 0.5) if norm else 0.0
