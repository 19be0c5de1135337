"""Who gets slots next: the front of the waiting line, without starving anybody. Pure policy, no tensors."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import islice

from service.core import ExpertKey, Pattern
from service.gating.slots import Reservation, SlotPool


@dataclass(frozen=True, slots=True)
class Claim:
    """What should be on the device before the coming step.

    Attributes:
        keep: experts in use, and those that the front of the line waits for or will use; nothing else may
            push them out.
        missing: those of them that are not in the pool, in order of the line.
        over_capacity: they exceed the capacity and are to be taken in all the same, because nobody else
            uses a slot any more and waiting would not help.
    """

    keep: dict[ExpertKey, None]
    missing: list[ExpertKey]
    over_capacity: bool = False


class SlotLine:
    """Turns the waiting line into claims on slots.

    Slots go strictly by the line: a pattern whose experts do not fit beside those in use and those claimed
    before it blocks the ones behind it. Requests whose experts are in their slots may still pass it, and
    could keep those slots busy for ever; so once it has been the first to lack experts for `patience` seconds
    the pool is *drained*: until it has them, only patterns within a set that leaves room for it may begin.

    Args:
        patience: seconds that the foremost pattern without its experts waits before the pool is drained.
        lookahead: how many waiting patterns are looked at.
    """

    def __init__(self, pool: SlotPool, patience: float, lookahead: int) -> None:
        self._pool = pool
        self._patience = patience
        self._lookahead = lookahead
        self._head: Pattern | None = None
        self._since = 0.0
        self._allowed: dict[ExpertKey, None] | None = None

    @property
    def draining(self) -> bool:
        """Some patterns are held back for the foremost one."""
        return self._allowed is not None

    def admits(self, pattern: Pattern) -> bool:
        """Whether the pattern may begin as far as draining goes."""
        allowed = self._allowed
        return allowed is None or all(key in allowed for key, _ in pattern.gates)

    def claim(
        self,
        in_use: Iterable[ExpertKey],
        waiting: Iterable[Pattern],
        barred: Container[ExpertKey],
        now: float,
    ) -> Claim:
        """Look at the line anew.

        Args:
            in_use: experts of running sequences.
            waiting: patterns of waiting sequences, first to go first.
            barred: experts that cannot be had now; patterns that need one are passed over.
            now: monotonic seconds.
        """
        used = dict.fromkeys(in_use)
        reserved = Reservation(self._pool, used)
        wanted: dict[ExpertKey, None] = {}
        head: Pattern | None = None
        blocked = False
        for pattern in islice(waiting, self._lookahead):
            keys = [key for key, _ in pattern.gates]
            if any(key in barred for key in keys):
                continue
            fits = reserved.extend(keys)
            if head is None and not (fits and all(key in self._pool for key in keys)):
                head = pattern
                blocked = not fits
            if not fits:
                break
            wanted.update(dict.fromkeys(keys))
        if head != self._head:
            self._head, self._since, self._allowed = head, now, None
        if head is not None and blocked and self._drain(head, used, wanted, now):
            wanted.update((key, None) for key, _ in head.gates)
            reserved.add(wanted)
            return Claim(reserved.keys, self._absent(wanted), over_capacity=True)
        return Claim(reserved.keys, self._absent(wanted))

    def _drain(
        self, head: Pattern, used: dict[ExpertKey, None], wanted: dict[ExpertKey, None], now: float
    ) -> bool:
        """Make room for a pattern that does not fit; True if nothing is left to wait for and it still does not."""
        room = Reservation(self._pool, wanted)
        keys = [key for key, _ in head.gates]
        possible = room.extend(keys)
        if not possible and wanted:
            # Those before it have their experts and go first; its turn comes when they have ended.
            self._allowed = None
            return False
        room.add(keys)
        if not possible and all(key in room for key in used):
            self._allowed = room.keys
            return True
        if self._allowed is not None or now - self._since >= self._patience:
            # Only ever shrinks, so that every slot outside of it falls idle in the end.
            for key in used if self._allowed is None else self._allowed:
                room.extend((key,))
            self._allowed = room.keys
        return False

    def _absent(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if key not in self._pool]
