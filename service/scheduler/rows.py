"""The pool of KV rows."""

import heapq


class RowPool:
    """Hands out the lowest free row, so that live rows stay close together."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))

    def take(self) -> int | None:
        """The lowest free row, or None."""
        return heapq.heappop(self._free) if self._free else None

    def give(self, row: int) -> None:
        """Return a row."""
        heapq.heappush(self._free, row)

    @property
    def free(self) -> int:
        """How many rows are free."""
        return len(self._free)

    @property
    def lowest_free(self) -> int | None:
        """The row that `take` would hand out."""
        return self._free[0] if self._free else None
