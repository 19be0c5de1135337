"""A request's pooled state: what its prompt's final states add up to, chunk by chunk."""

import torch
from torch import Tensor

from service.core import Pooling
from service.engine.sampling.state import NotFiniteError


class Pool:
    """Takes a prompt's states in order; one that begins again, after a preemption, replaces what was there.

    Attributes:
        pooling: which tokens count.
    """

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self._sum: Tensor | None = None
        self._count = 0

    def put(self, first: int, states: Tensor) -> None:
        """Take (n, hidden) states of the tokens from position `first` on.

        Raises:
            NotFiniteError: there is NaN or infinity in them.
        """
        if self.pooling == "last":
            states, first = states[-1:], 0
        # In float64 the result does not depend on where chunks end.
        added = states.to(torch.float64).sum(0)
        if not bool(torch.isfinite(added).all()):
            raise NotFiniteError("the model gave NaN or infinite states")
        begins = self._sum is None or first == 0
        self._sum = added if begins or self._sum is None else self._sum + added
        self._count = len(states) if begins else self._count + len(states)

    @property
    def value(self) -> tuple[float, ...] | None:
        """The float32 values of the mean, or of the last state; None as long as nothing came."""
        if self._sum is None:
            return None
        values: list[float] = (self._sum / self._count).to(torch.float32).tolist()
        return tuple(values)
