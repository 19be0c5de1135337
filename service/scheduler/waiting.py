"""The waiting line: who is next.

Order: the starved by arrival; then priority; then those that were preempted; then the client that got least;
then a pattern whose experts are active anyway; then arrival. One choice looks at a bounded number of lanes,
however long the line is.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, islice
from operator import attrgetter

from service.core import Pattern
from service.scheduler.experts import ActiveExperts
from service.scheduler.fairness import LOOKAHEAD, FairShare, LeastServed
from service.scheduler.sequence import Sequence

_rank = attrgetter("rank")
_Test = Callable[[Sequence], bool]


class _Client:
    """One client's sequences of one priority: a lane for each pattern, lanes by the arrival of their first."""

    def __init__(self) -> None:
        self.lanes: dict[bytes, list[Sequence]] = {}
        self.heads: list[tuple[tuple[int, int], bytes]] = []

    def push(self, sequence: Sequence) -> None:
        lane = self.lanes.setdefault(sequence.root, [])
        with_head = lane[0] if lane else None
        insort(lane, sequence, key=_rank)
        self._rehead(with_head, lane)

    def drop(self, sequence: Sequence) -> None:
        lane = self.lanes[sequence.root]
        head = lane[0]
        del lane[bisect_left(lane, sequence.rank, key=_rank)]
        self._rehead(head, lane)
        if not lane:
            del self.lanes[sequence.root]

    def first(self, usable: _Test, widens: _Test) -> Sequence | None:
        second_best: Sequence | None = None
        for _, root in islice(self.heads, LOOKAHEAD):
            sequence = self.lanes[root][0]
            if usable(sequence):
                if not widens(sequence):
                    return sequence
                second_best = second_best or sequence
        return second_best

    def _rehead(self, old: Sequence | None, lane: list[Sequence]) -> None:
        new = lane[0] if lane else None
        if old is new:
            return
        if old is not None:
            del self.heads[bisect_left(self.heads, (old.rank, old.root))]
        if new is not None:
            insort(self.heads, (new.rank, new.root))


class _Priority:
    """The sequences of one priority."""

    def __init__(self, shares: FairShare) -> None:
        self._shares = shares
        self.returned: list[Sequence] = []
        self.clients: dict[str, _Client] = {}
        self.turns = LeastServed(shares.served)

    def __bool__(self) -> bool:
        return bool(self.returned or self.clients)

    def push(self, sequence: Sequence) -> None:
        name = self._shares.client(sequence)
        if sequence.preemptions:
            insort(self.returned, sequence, key=_rank)
            return
        if name not in self.clients:
            self.clients[name] = _Client()
            self.turns.add(name)
        self.clients[name].push(sequence)

    def drop(self, sequence: Sequence) -> None:
        if sequence.preemptions:
            self.returned.remove(sequence)
            return
        name = self._shares.client(sequence)
        self.clients[name].drop(sequence)
        if not self.clients[name].heads:
            del self.clients[name]
            self.turns.discard(name)

    def first(self, usable: _Test, widens: _Test) -> Sequence | None:
        back = next((sequence for sequence in self.returned if usable(sequence)), None)
        return back or self.turns.first(lambda name: self.clients[name].first(usable, widens))

    def heads(self) -> Iterator[Sequence]:
        """The first of every lane, in roughly the order of admission."""
        yield from self.returned
        for name in self.turns.roughly():
            client = self.clients[name]
            yield from (client.lanes[root][0] for _, root in client.heads)


class WaitingLine:
    """All sequences that wait for admission.

    Args:
        max_wait: seconds after which a sequence counts as starved.
    """

    def __init__(self, max_wait: float, shares: FairShare) -> None:
        self._max_wait = max_wait
        self._shares = shares
        self._since: OrderedDict[Sequence, float] = OrderedDict()
        self._parked: set[Sequence] = set()
        self._priorities: dict[int, _Priority] = {}

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._since

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._since)

    def push(self, sequence: Sequence, now: float, *, parked: bool = False) -> None:
        """Take a sequence in; a preempted one goes to the head of its priority.

        Args:
            now: monotonic seconds, never less than at the last push.
            parked: out of everybody's way until `release`.
        """
        self._since[sequence] = now
        if parked:
            self._parked.add(sequence)
        else:
            self._place(sequence)

    def release(self, sequence: Sequence) -> None:
        """A parked sequence takes the place that its arrival gives it."""
        self._parked.remove(sequence)
        self._place(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        del self._since[sequence]
        if sequence in self._parked:
            self._parked.remove(sequence)
            return
        priority = sequence.rank[0]
        self._priorities[priority].drop(sequence)
        if not self._priorities[priority]:
            del self._priorities[priority]

    def first(self, now: float, experts: ActiveExperts) -> Sequence | None:
        """Who is to be admitted next; stays in the line.

        A sequence whose experts are not in their slots is passed over. Once it is starved only sequences
        without experts pass it: others would keep the slots full that it waits for.
        """
        held = False
        for sequence, since in islice(self._since.items(), LOOKAHEAD):
            if now - since <= self._max_wait:
                break
            if sequence not in self._parked:
                if experts.ready(sequence) and not (held and _takes_slots(sequence)):
                    return sequence
                held = True

        def usable(sequence: Sequence) -> bool:
            return experts.ready(sequence) and not (held and _takes_slots(sequence))

        for priority in sorted(self._priorities):
            found = self._priorities[priority].first(usable, experts.widens)
            if found is not None:
                return found
        return None

    def patterns(self) -> Iterator[Pattern]:
        """Each pattern once: that of who waits longest, then roughly in the order of admission."""
        heads = chain.from_iterable(
            self._priorities[priority].heads() for priority in sorted(self._priorities)
        )
        seen: set[bytes] = set()
        for sequence in chain(islice(self._since, 1), heads):
            if sequence.pattern is not None and sequence.root not in seen:
                seen.add(sequence.root)
                yield sequence.pattern

    def check(self) -> None:
        """Every sequence has one place.

        Raises:
            AssertionError: somebody is lost, or in two places.
        """
        placed = list(self._parked)
        for priority in self._priorities.values():
            assert priority, "an empty priority stays"
            placed += priority.returned
            assert len(priority.turns) == len(priority.clients)
            for client in priority.clients.values():
                assert client.heads == sorted((lane[0].rank, root) for root, lane in client.lanes.items())
                placed += chain.from_iterable(client.lanes.values())
        assert len(placed) == len(self._since), f"{len(placed)} places for {len(self._since)} sequences"
        assert set(placed) == self._since.keys(), "the line and its lanes differ"

    def _place(self, sequence: Sequence) -> None:
        priority = sequence.rank[0]
        if priority not in self._priorities:
            self._priorities[priority] = _Priority(self._shares)
        self._priorities[priority].push(sequence)


def _takes_slots(sequence: Sequence) -> bool:
    return sequence.pattern is None or bool(sequence.pattern.gates)
