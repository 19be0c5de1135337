"""A byte budget shared out over many matrices: greedily by energy saved per byte, in one precision or several.

Spectra come in one after another. Only what could still be bought at twice the budget is held, so memory
stays near the budget however large the model is.
"""

from collections.abc import Sequence

import torch

from experts.compression.precision import ladder
from experts.compression.svd import Decomposition
from experts.compression.weighted import WeightedDecomposition
from experts.errors import CompressionError

Decomposed = Decomposition | WeightedDecomposition
Counts = dict[int, int]
"""Bits → how many singular values are stored in them, the largest values in the most."""

_SLACK = 2
"""Held in multiples of the budget; above 1, so that small values can fill what large ones leave."""


class BudgetAllocation:
    """Collects decompositions, then says how many singular values of each the budget buys, and how precise."""

    def __init__(self, budget_bytes: int, widths: Sequence[int]) -> None:
        """Share out `budget_bytes` for factors stored in any of `widths` bits."""
        self._budget = budget_bytes
        self._widths = tuple(widths)
        self._held: dict[str, Decomposed] = {}
        self._bytes = 0
        """Of all that is held, in the narrowest form."""

    def add(self, name: str, decomposition: Decomposed) -> None:
        """Take one more matrix."""
        self._held[name] = decomposition
        self._bytes += self._narrow(decomposition)
        limit = _SLACK * self._budget
        if self._bytes > 2 * limit:
            for kept, counts in self._greedy(limit, fill=False).items():
                self._held[kept] = self._held[kept].kept(sum(counts.values()))
            self._bytes = sum(map(self._narrow, self._held.values()))

    def counts(self, reserved_bytes: int) -> dict[str, tuple[Decomposed, Counts]]:
        """Each matrix with what is bought of it, once all are in.

        Args:
            reserved_bytes: what other tensors take of the budget.

        Raises:
            CompressionError: the budget cannot hold the reserved bytes and one singular value.
        """
        left = self._budget - reserved_bytes
        least = min((self._least(part) for part in self._held.values() if len(part.values)), default=0)
        if left < least:
            raise CompressionError(
                f"a budget of {self._budget} bytes cannot hold {reserved_bytes} bytes of exact vectors and "
                f"one singular value of {least} bytes; give at least {reserved_bytes + least}"
            )
        bought = self._greedy(left, fill=True)
        return {name: (part, bought[name]) for name, part in self._held.items()}

    def _narrow(self, part: Decomposed) -> int:
        """Bytes of all that is held of one matrix, in the narrowest form."""
        return part.U.shape[1] * self._least(part)

    def _least(self, part: Decomposed) -> int:
        """Bytes of one singular value with its two vectors, in the narrowest form."""
        return ladder(_shape(part), self._widths)[0].nbytes

    def _greedy(self, limit: int, *, fill: bool) -> dict[str, Counts]:
        """What is bought in order of energy per byte; without `fill` the first that does not fit ends it."""
        names = list(self._held)
        rungs = [ladder(_shape(part), self._widths) for part in self._held.values()]
        worths, items = [], []
        for owner, part in enumerate(self._held.values()):
            energies = part.values[: part.U.shape[1]].square()
            for height, rung in enumerate(rungs[owner]):
                worths.append(energies * (rung.gain / rung.nbytes))
                items.append(torch.tensor([[owner, height]]).expand(len(energies), 2))
        reached = [[0] * len(own) for own in rungs]
        closed: set[int] = set()
        order = torch.cat(worths).argsort(descending=True, stable=True) if worths else torch.empty(0).long()
        for owner, height in torch.cat(items)[order].tolist() if items else ():
            if owner in closed:
                continue
            cost = rungs[owner][height].nbytes
            if cost > limit:
                if not fill:
                    break
                closed.add(owner)
                continue
            limit -= cost
            reached[owner][height] += 1
        return {
            name: {
                rung.bits: count - above
                for rung, count, above in zip(own, got, [*got[1:], 0], strict=True)
                if count > above
            }
            for name, own, got in zip(names, rungs, reached, strict=True)
        }


def _shape(part: Decomposed) -> tuple[int, int]:
    return part.U.shape[0], part.Vh.shape[1]
