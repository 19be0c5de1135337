"""Which generation of each expert is current, and who still uses which: names, generations, leases."""

import threading
from collections.abc import Iterable, Mapping

from service.core import ExpertKey, Pattern
from service.errors import UnknownExpertError


class Catalogue:
    """Current generations and leases. Thread-safe: requests take leases on the event loop, give them back
    on the engine thread.

    A lease keeps a generation's factors in place until the request ends, whatever operators do meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: dict[str, ExpertKey] = {}
        self._leases: dict[ExpertKey, int] = {}

    def publish(self, key: ExpertKey) -> list[ExpertKey]:
        """Make a generation current; returns generations that nobody needs any more."""
        with self._lock:
            old = self._current.get(key.name)
            self._current[key.name] = key
            self._leases.setdefault(key, 0)
            return self._collect([old] if old is not None and old != key else [])

    def retire(self, name: str) -> list[ExpertKey]:
        """No new request gets the expert; returns generations that nobody needs any more."""
        with self._lock:
            old = self._current.pop(name, None)
            return self._collect([old] if old is not None else [])

    def lease(self, gates: Mapping[str, float], generations: Mapping[str, int] | None = None) -> Pattern:
        """Bind expert names to their current generations and hold those; zero gates are dropped.

        Args:
            gates: name → weight.
            generations: name → the generation that must be the current one.

        Raises:
            UnknownExpertError: a name is not registered, or another generation is; nothing is held then.
        """
        with self._lock:
            for name in gates:
                if name not in self._current:
                    known = ", ".join(sorted(self._current)) or "none"
                    raise UnknownExpertError(
                        f"no expert named {name!r}; registered: {known}", param=f"gates.{name}"
                    )
                now = self._current[name].generation
                if generations and generations.get(name, now) != now:
                    raise UnknownExpertError(
                        f"generation {generations[name]} of {name!r} is not live; {now} is",
                        param=f"gates.{name}",
                    )
            bound = sorted((self._current[name], float(weight)) for name, weight in gates.items() if weight)
            for key, _ in bound:
                self._leases[key] += 1
            return Pattern(tuple(bound))

    def share(self, pattern: Pattern) -> None:
        """One more lease on generations that somebody holds, whether they are current or not."""
        with self._lock:
            for key in pattern.experts:
                self._leases[key] += 1

    def release(self, pattern: Pattern) -> list[ExpertKey]:
        """Give a lease back; returns generations that nobody needs any more."""
        with self._lock:
            for key in pattern.experts:
                self._leases[key] -= 1
            return self._collect(pattern.experts)

    def current(self) -> dict[str, ExpertKey]:
        """Name → current generation."""
        with self._lock:
            return dict(self._current)

    def leases(self) -> dict[ExpertKey, int]:
        """Live requests of every generation that is current or still used."""
        with self._lock:
            return dict(self._leases)

    def _collect(self, candidates: Iterable[ExpertKey]) -> list[ExpertKey]:
        freed = [
            key for key in candidates if self._leases.get(key) == 0 and self._current.get(key.name) != key
        ]
        for key in freed:
            del self._leases[key]
        return freed
