"""A byte budget shared out over many matrices: greedily by singular-value energy per byte.

Spectra come in one after another. Only what could still be bought at twice the budget is held, so memory
stays near the budget however large the model is.
"""

import torch

from experts.compression.svd import Decomposition
from experts.errors import CompressionError

_SLACK = 2
"""Held in multiples of the budget; above 1, so that small values can fill what large ones leave."""


class BudgetAllocation:
    """Collects decompositions, then says how many singular values of each the budget buys."""

    def __init__(self, budget_bytes: int, dtype: torch.dtype) -> None:
        """Share out `budget_bytes` for factors stored in `dtype`."""
        self._budget = budget_bytes
        self._dtype = dtype
        self._held: dict[str, Decomposition] = {}

    def add(self, name: str, decomposition: Decomposition) -> None:
        """Take one more matrix."""
        self._held[name] = decomposition
        limit = _SLACK * self._budget
        if sum(part.U.shape[1] * self._cost(part) for part in self._held.values()) > 2 * limit:
            for kept, rank in self._greedy(limit, fill=False).items():
                self._held[kept] = self._held[kept].kept(rank)

    def ranks(self, reserved_bytes: int) -> dict[str, tuple[Decomposition, int]]:
        """Each matrix with its rank, once all are in.

        Args:
            reserved_bytes: what other tensors take of the budget.

        Raises:
            CompressionError: the budget cannot hold the reserved bytes and one singular value.
        """
        left = self._budget - reserved_bytes
        ranks = self._greedy(left, fill=True)
        least = min((self._cost(part) for part in self._held.values() if len(part.values)), default=0)
        if left < least:
            raise CompressionError(
                f"a budget of {self._budget} bytes cannot hold {reserved_bytes} bytes of exact vectors and "
                f"one singular value of {least} bytes; give at least {reserved_bytes + least}"
            )
        return {name: (part, ranks[name]) for name, part in self._held.items()}

    def _cost(self, part: Decomposition) -> int:
        """Bytes of one singular value with its two vectors."""
        return (part.U.shape[0] + part.Vh.shape[1]) * self._dtype.itemsize + torch.float32.itemsize

    def _greedy(self, limit: int, *, fill: bool) -> dict[str, int]:
        """Ranks bought in order of energy per byte; without `fill` the first that does not fit ends it."""
        names = list(self._held)
        costs = [self._cost(part) for part in self._held.values()]
        worths = [
            part.values[: part.U.shape[1]].square() / cost
            for part, cost in zip(self._held.values(), costs, strict=True)
        ]
        owners = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(w) for w in worths]))
        order = torch.cat(worths).argsort(descending=True, stable=True)
        ranks = dict.fromkeys(names, 0)
        closed: set[int] = set()
        for owner in owners[order].tolist():
            if owner in closed:
                continue
            if costs[owner] > limit:
                if not fill:
                    break
                closed.add(owner)
                continue
            limit -= costs[owner]
            ranks[names[owner]] += 1
        return ranks
