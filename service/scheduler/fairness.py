"""Whose turn it is: virtual token counters (VTC, arXiv 2401.00588), least served first."""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TypeVar

from service.scheduler.policy import Policy
from service.scheduler.sequence import Sequence

LOOKAHEAD = 64
"""How many clients, and patterns of a client, one choice looks at: what keeps it cheap in a long line."""

_Found = TypeVar("_Found")


class LeastServed:
    """A set of clients in order of their counters, the least first.

    Counters only grow while a client is in some set, so an entry is at worst too far in front; it is put
    right when it gets there.
    """

    def __init__(self, served: Mapping[str, float]) -> None:
        self._served = served
        self._members: set[str] = set()
        self._heap: list[tuple[float, str]] = []
        self._listed: set[str] = set()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, client: str) -> None:
        """Take a client in; harmless if it is."""
        self._members.add(client)
        if client not in self._listed:
            self._listed.add(client)
            heapq.heappush(self._heap, (self._served[client], client))

    def discard(self, client: str) -> None:
        """Leave a client out; harmless if it is."""
        self._members.discard(client)

    def first(self, choose: Callable[[str], _Found | None]) -> _Found | None:
        """What `choose` makes of the first client of whom it makes anything; it sees 64 at most."""
        asked: list[tuple[float, str]] = []
        found: _Found | None = None
        while found is None and len(asked) < LOOKAHEAD and (client := self._surface()) is not None:
            asked.append(heapq.heappop(self._heap))
            found = choose(client)
        for entry in asked:
            heapq.heappush(self._heap, entry)
        return found

    def roughly(self) -> list[str]:
        """The first clients, in nearly the right order, without sorting."""
        return [client for _, client in islice(self._heap, LOOKAHEAD) if client in self._members]

    def _surface(self) -> str | None:
        """Make the first entry of the heap a right one."""
        while self._heap:
            served, client = self._heap[0]
            if client not in self._members:
                heapq.heappop(self._heap)
                self._listed.remove(client)
            elif served != self._served[client]:
                heapq.heapreplace(self._heap, (self._served[client], client))
            else:
                return client
        return None


class FairShare:
    """Weighted tokens that every active client got.

    A client that comes back from idling is lifted to the least of the active ones: idling earns no credit.
    When nobody is active all is forgotten, so memory follows the clients of one busy period.

    Attributes:
        served: client → virtual tokens.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.served: dict[str, float] = {}
        self._sequences: Counter[str] = Counter()
        self._active = LeastServed(self.served)

    def client(self, sequence: Sequence) -> str:
        """Whom the sequence counts against."""
        return sequence.request.client if self._policy.fair_share else ""

    def enter(self, sequence: Sequence) -> None:
        """A sequence of its client begins to wait."""
        client = self.client(sequence)
        if not self._sequences[client]:
            floor = self._active.first(self.served.get)
            self.served[client] = max(self.served.get(client, 0.0), floor or 0.0)
            self._active.add(client)
        self._sequences[client] += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence of its client has ended."""
        client = self.client(sequence)
        self._sequences[client] -= 1
        if not self._sequences[client]:
            del self._sequences[client]
            self._active.discard(client)
        if not self._sequences:
            self.served.clear()
            self._active = LeastServed(self.served)

    def charge(self, sequence: Sequence, *, prompt: int = 0, generated: int = 0) -> None:
        """Count tokens against the client of a sequence that is here."""
        cost = self._policy.prompt_weight * prompt + self._policy.generated_weight * generated
        self.served[self.client(sequence)] += cost

    def check(self, present: Counter[str]) -> None:
        """Compare with the clients of all sequences that are here.

        Raises:
            AssertionError: a client is counted wrongly.
        """
        assert self._sequences == present, f"counted {self._sequences}, present {present}"
        assert present.keys() <= self.served.keys()
        assert present or not self.served, "counters outlive the busy period"
