"""What a fine-tune is to the rest of the library, and the full fine-tune: a model folder beside its base."""

from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from experts.checkpoint.model import Checkpoint
from experts.checkpoint.names import HEADS
from experts.errors import MismatchError
from experts.factors import Delta


class FineTune(Protocol):
    """A task vector θ_t − θ₀, tensor by tensor."""

    @property
    def name(self) -> str:
        """The expert's name."""

    @property
    def path(self) -> Path:
        """The folder it came from."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files that hold it."""

    def touched(self) -> frozenset[str]:
        """Names of the parameters that differ from the base."""

    def delta(self, name: str) -> Delta | None:
        """θ_t − θ₀ of one parameter in float32; `LowRank` where it is a product, None where untouched."""

    def tensor(self, name: str) -> Tensor | None:
        """θ_t of one parameter where the fine-tune stores it itself, as stored; None where only δ is known.

        Where it is not None, the exclusive vector is θ_t − θ* with no need of θ₀, and `delta` is relative
        to whatever checkpoint was given as the base.
        """


class FullFineTune:
    """A fine-tune that is a whole model of the base's architecture."""

    def __init__(self, name: str, checkpoint: Checkpoint, base: Checkpoint) -> None:
        """Pair a fine-tune with its base.

        Raises:
            MismatchError: a parameter is missing, surplus or of another shape; names it.
        """
        self.name = name
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.files = checkpoint.files
        self._base = base
        _check_parameters(checkpoint, base)

    @cached_property
    def _touched(self) -> frozenset[str]:
        return frozenset(name for name in self._base.names if self._differs(name))

    def touched(self) -> frozenset[str]:
        """Names of the parameters that differ from the base. Reads both models once."""
        return self._touched

    def _differs(self, name: str) -> bool:
        ours, theirs = self.checkpoint.tensor(name), self._base.tensor(name)
        if ours.dtype != theirs.dtype:
            ours, theirs = ours.to(torch.float32), theirs.to(torch.float32)
        return not torch.equal(ours, theirs)

    def delta(self, name: str) -> Tensor | None:
        """θ_t − θ₀ of one parameter, dense float32; None where they are equal."""
        self._base.stored(name)
        if not self._differs(name):
            return None
        return self.checkpoint.tensor(name).to(torch.float32) - self._base.tensor(name).to(torch.float32)

    def tensor(self, name: str) -> Tensor:
        """θ_t of one parameter, as stored."""
        return self.checkpoint.tensor(name)


def _check_parameters(checkpoint: Checkpoint, base: Checkpoint) -> None:
    for name in base.names:
        if name not in checkpoint:
            raise MismatchError(
                f"{checkpoint.path} lacks the base's parameter {name}; save the whole model, not a part of it"
            )
        require_shape(checkpoint.path, name, checkpoint.shape(name), base)
    for name in checkpoint.names:
        if name not in base:
            mend = (
                "the base ties its output head to the embedding, so fine-tune with tie_word_embeddings=true"
                if name in HEADS
                else f"it is not a fine-tune of {base.path}"
            )
            raise MismatchError(f"{checkpoint.path} has a parameter {name} that the base lacks; {mend}")


def require_shape(path: Path, name: str, shape: tuple[int, ...], base: Checkpoint) -> None:
    """Raise if a fine-tune's parameter has another shape than the base's.

    Raises:
        MismatchError: names the tensor, and the vocabulary where its size is what differs.
    """
    expected = base.shape(name)
    if shape == expected:
        return
    if len(shape) == len(expected) == 2 and shape[1] == expected[1] and expected[0] == base.vocab_rows:
        raise MismatchError(
            f"{path} has another vocabulary: {name} has {shape[0]} rows, the base has {expected[0]}; "
            "fine-tune without adding tokens or resizing the embeddings"
        )
    raise MismatchError(
        f"{path}: {name} has shape {list(shape)}, the base has {list(expected)}; "
        f"it is not a fine-tune of {base.path}"
    )
