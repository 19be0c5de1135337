"""Brings experts onto the device before their requests run, and takes others off.

All methods are for the engine thread. What a step costs depends on the running and the foremost waiting
sequences, never on how many experts are registered.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from service.core import ExpertKey, Pattern
from service.engine.loader import Loaded, Loader
from service.errors import ExpertUnavailableError
from service.gating.resident import ResidentExpert
from service.gating.slot_line import Claim, SlotLine
from service.gating.slots import SlotPool

logger = logging.getLogger(__name__)


class Slots(Protocol):
    """What residency needs of `ExpertBank`."""

    def add(self, expert: ResidentExpert) -> None:
        """Make an expert available to patterns."""

    def remove(self, key: ExpertKey) -> None:
        """Give an expert's memory back, if it is there."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What `Residency.settle` changed.

    Attributes:
        loaded: experts that came into their slots → seconds that loading took.
        evicted: experts that lost theirs.
        failed: experts that cannot be had for now; every waiting request that needs one must end with the error.
    """

    loaded: Mapping[ExpertKey, float] = field(default_factory=dict)
    evicted: tuple[ExpertKey, ...] = ()
    failed: Mapping[ExpertKey, ExpertUnavailableError] = field(default_factory=dict)


@dataclass(slots=True)
class ResidencyStats:
    """Totals since the start; a hit or miss is one expert of one request at the time when it is queued."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    failures: int = 0
    evictions: int = 0


class Residency:
    """Keeps the experts of running and soon-to-run requests in their slots.

    Args:
        bank: holds the device tensors; nobody else adds or removes experts.
        pool: the slots.
        loader: where missing experts come from.
        running: patterns of the running sequences, whose experts stay whatever happens.
        patience_seconds, lookahead: see `SlotLine`.
        in_flight: experts that are being loaded or wait for their slot at a time; that many may be in memory
            beyond the capacity.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        bank: Slots,
        pool: SlotPool,
        loader: Loader,
        running: Callable[[], Iterable[Pattern]],
        *,
        patience_seconds: float = 1.0,
        lookahead: int = 64,
        in_flight: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.loader = loader
        self._bank = bank
        self._running = running
        self._line = SlotLine(pool, patience_seconds, lookahead)
        self._in_flight = in_flight
        self._clock = clock
        self._staged: dict[ExpertKey, Loaded] = {}
        self._stats = ResidencyStats()

    @property
    def loading(self) -> bool:
        """A load is under way, and `loader.on_loaded` will be called."""
        return len(self.loader) > 0

    @property
    def stats(self) -> ResidencyStats:
        """A copy of the totals; any thread."""
        return replace(self._stats)

    def ready(self, pattern: Pattern) -> bool:
        """Its experts are in their slots and stay there until the next `settle`, so that a sequence may begin."""
        return all(key in self.pool for key, _ in pattern.gates) and self._line.admits(pattern)

    def complete(self, registered: int) -> bool:
        """Every registered expert has a slot and keeps it, so that any gates can be used at once."""
        return not self.pool.limited and len(self.pool) >= registered

    def expect(self, pattern: Pattern) -> None:
        """A request with these gates is about to be queued; `settle` fetches what it needs.

        Raises:
            ExpertUnavailableError: one of its experts could not be loaded just now.
        """
        unavailable = self.loader.unavailable()
        for key, _ in pattern.gates:
            if key in unavailable:
                raise unavailable[key]
        found = sum(key in self.pool for key, _ in pattern.gates)
        self._stats.hits += found
        self._stats.misses += len(pattern.gates) - found

    def settle(self, waiting: Iterable[Pattern]) -> Settled:
        """Put what was loaded into slots and fetch what is wanted next. Between two steps, before planning.

        Args:
            waiting: patterns of waiting sequences, first to go first; read no further than needed.
        """
        collected = self.loader.collect()
        for key, made in collected.loaded.items():
            self.pool.learn(key, made.expert.nbytes)
            self._stats.loads += 1
            self._stats.load_seconds += made.seconds
        self._stats.failures += collected.failures
        self._staged.update(collected.loaded)
        in_use = self._in_use()
        self.pool.touch(in_use)
        failed = self.loader.unavailable()
        claim = self._line.claim(in_use, waiting, failed, self._clock())
        evicted = self.pool.shrink(claim.keep)
        self._drop(evicted)
        loaded = {key: made for key, made in list(self._staged.items()) if self._place(key, claim, evicted)}
        self._fetch(claim.missing)
        return Settled({key: made.seconds for key, made in loaded.items()}, tuple(evicted), failed)

    def publish(self, expert: ResidentExpert) -> bool:
        """A generation that was prepared elsewhere takes a slot, if one can be had; else it is loaded on demand.

        Returns whether it has one.
        """
        key = expert.key
        self.loader.abandon(key)
        self._staged.pop(key, None)
        self.pool.remove(key)
        in_use = self._in_use()
        victims = self.pool.place(key, expert.nbytes, in_use, force=key in in_use)
        if victims is None:
            logger.info("expert %s finds no free slot and is loaded when it is wanted", key)
            self._bank.remove(key)
            return False
        self._drop(victims)
        self._bank.add(expert)
        return True

    def vacate(self, key: ExpertKey) -> None:
        """Free a generation's slot at once; it is loaded again if somebody wants it."""
        if key in self.pool:
            self.pool.remove(key)
            self._bank.remove(key)

    def forget(self, key: ExpertKey) -> None:
        """The generation exists no more and nobody uses it: free its slot and all that is kept of it."""
        self.loader.forget(key)
        self._staged.pop(key, None)
        self.pool.forget(key)
        self._bank.remove(key)

    def _in_use(self) -> dict[ExpertKey, None]:
        if not self.pool.limited:
            return {}
        return {key: None for pattern in self._running() for key, _ in pattern.gates}

    def _place(self, key: ExpertKey, claim: Claim, evicted: list[ExpertKey]) -> bool:
        """Give a loaded expert its slot; one that the front of the line does not claim takes only a free one."""
        made, nbytes = self._staged[key], self.pool.size(key)
        claimed = key in claim.keep
        if not claimed and not self.pool.room_for(len(self.pool) + 1, self.pool.used_bytes + nbytes):
            del self._staged[key]
            return False
        victims = self.pool.place(key, nbytes, claim.keep, force=claim.over_capacity)
        if victims is None:
            return False
        del self._staged[key]
        self._drop(victims)
        self._bank.add(made.expert)
        evicted += victims
        return True

    def _fetch(self, missing: Iterable[ExpertKey]) -> None:
        for key in missing:
            if len(self.loader) + len(self._staged) >= self._in_flight:
                return
            if key not in self.pool and key not in self.loader and key not in self._staged:
                self.loader.start(key)

    def _drop(self, victims: list[ExpertKey]) -> None:
        for key in victims:
            self._bank.remove(key)
        self._stats.evictions += len(victims)
