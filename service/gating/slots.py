"""Which experts have a place on the device: a bounded pool, least recently used out first. Knows no tensors."""

from collections import OrderedDict
from collections.abc import Container, Iterable

from service.core import ExpertKey


class SlotPool:
    """Expert generations that are on the device, their sizes, and who must go for another.

    Those that the caller wants kept, and those pinned by name, are never put out. Only where they alone
    exceed the capacity is it exceeded: `excess` says by how much. Used by one thread; numbers may be read
    by others.

    Args:
        max_experts: most generations at once; None is no limit.
        max_bytes: most bytes of factors on the device; None is no limit.
        pinned: names whose generations stay once they are in.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(
        self, *, max_experts: int | None = None, max_bytes: int | None = None, pinned: Iterable[str] = ()
    ) -> None:
        for limit in (max_experts, max_bytes):
            if limit is not None and limit < 1:
                raise ValueError(f"a limit of {limit} leaves no place for any expert")
        self.max_experts = max_experts
        self.max_bytes = max_bytes
        self.pinned_names = frozenset(pinned)
        self.used_bytes = 0
        self._held: OrderedDict[ExpertKey, None] = OrderedDict()
        self._pinned: dict[ExpertKey, None] = {}
        self._sizes: dict[ExpertKey, int] = {}
        self._known_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._held

    @property
    def limited(self) -> bool:
        """There is a limit, so that experts may have to go."""
        return self.max_experts is not None or self.max_bytes is not None

    @property
    def excess(self) -> tuple[int, int]:
        """Experts and bytes beyond the capacity; (0, 0) unless what must be kept alone exceeds it."""
        experts = 0 if self.max_experts is None else len(self._held) - self.max_experts
        nbytes = 0 if self.max_bytes is None else self.used_bytes - self.max_bytes
        return max(experts, 0), max(nbytes, 0)

    @property
    def pinned(self) -> Iterable[ExpertKey]:
        """Pinned generations that are in."""
        return self._pinned.keys()

    def keys(self) -> list[ExpertKey]:
        """Every generation that is in, least recently used first."""
        return list(self._held)

    def size(self, key: ExpertKey) -> int:
        """Bytes of a generation; one that was never in counts as the mean of those that were."""
        known = self._sizes.get(key)
        return self._known_bytes // max(len(self._sizes), 1) if known is None else known

    def learn(self, key: ExpertKey, nbytes: int) -> None:
        """Remember how large a generation is."""
        grown = nbytes - self._sizes.get(key, 0)
        self._known_bytes += grown
        self._sizes[key] = nbytes
        if key in self._held:
            self.used_bytes += grown

    def room_for(self, experts: int, nbytes: int) -> bool:
        """Whether that many experts of that many bytes in all fit an empty pool."""
        return (self.max_experts is None or experts <= self.max_experts) and (
            self.max_bytes is None or nbytes <= self.max_bytes
        )

    def touch(self, keys: Iterable[ExpertKey]) -> None:
        """These are used now; the last is the most recent. Those that are not in are passed over."""
        for key in keys:
            if key in self._held:
                self._held.move_to_end(key)

    def place(
        self, key: ExpertKey, nbytes: int, keep: Container[ExpertKey] = (), *, force: bool = False
    ) -> list[ExpertKey] | None:
        """Take a generation in as the most recently used one.

        Args:
            nbytes: its bytes on the device.
            keep: never put out for it.
            force: take it in even if what must be kept leaves no room.

        Returns:
            Who was put out for it; None if there is no room, and then nothing has changed.
        """
        if key in self._held:
            self.touch((key,))
            return []
        self.learn(key, nbytes)
        victims, enough = self._victims(len(self._held) + 1, self.used_bytes + nbytes, keep)
        if not enough and not force:
            return None
        for victim in victims:
            self.remove(victim)
        self._held[key] = None
        self.used_bytes += nbytes
        if key.name in self.pinned_names:
            self._pinned[key] = None
        return victims

    def shrink(self, keep: Container[ExpertKey]) -> list[ExpertKey]:
        """Put out what no longer has to be kept while the capacity is exceeded; returns who."""
        victims, _ = self._victims(len(self._held), self.used_bytes, keep)
        for victim in victims:
            self.remove(victim)
        return victims

    def remove(self, key: ExpertKey) -> None:
        """Free a generation's place, whoever wants it kept; its size stays known."""
        if key in self._held:
            del self._held[key]
            self._pinned.pop(key, None)
            self.used_bytes -= self._sizes[key]

    def forget(self, key: ExpertKey) -> None:
        """The generation exists no more: free its place and its size."""
        self.remove(key)
        self._known_bytes -= self._sizes.pop(key, 0)

    def _victims(self, experts: int, nbytes: int, keep: Container[ExpertKey]) -> tuple[list[ExpertKey], bool]:
        """Least recently used first, as many as it takes to bring the totals down; and whether that is enough."""
        victims: list[ExpertKey] = []
        if self.room_for(experts, nbytes):
            return victims, True
        for key in self._held:
            if key in self._pinned or key in keep:
                continue
            victims.append(key)
            experts, nbytes = experts - 1, nbytes - self._sizes[key]
            if self.room_for(experts, nbytes):
                return victims, True
        return victims, False


class Reservation:
    """Experts that shall be in the pool together, pinned ones included, and whether they all fit."""

    def __init__(self, pool: SlotPool, keys: Iterable[ExpertKey] = ()) -> None:
        self._pool = pool
        self.keys: dict[ExpertKey, None] = {}
        self._nbytes = 0
        self.add(pool.pinned)
        self.add(keys)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self.keys

    def add(self, keys: Iterable[ExpertKey]) -> None:
        """Count them in, whether they fit or not."""
        for key in keys:
            if key not in self.keys:
                self.keys[key] = None
                self._nbytes += self._pool.size(key)

    def extend(self, keys: Iterable[ExpertKey]) -> bool:
        """Count them in if all fit beside the others; else nothing changes. Nothing new always fits."""
        new = dict.fromkeys(key for key in keys if key not in self.keys)
        nbytes = self._nbytes + sum(self._pool.size(key) for key in new)
        if new and not self._pool.room_for(len(self.keys) + len(new), nbytes):
            return False
        self.keys.update(new)
        self._nbytes = nbytes
        return True
