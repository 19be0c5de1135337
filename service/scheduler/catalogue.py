"""Which generation of each expert is current, and who still uses which: names, generations, leases."""

import threading
from collections.abc import Iterable, Mapping
from typing import Literal

from service.core import ExpertKey, Pattern
from service.errors import UnknownExpertError

Reach = Literal["active", "trial", "staged"]
"""How a request comes to a generation: by the expert's name, by a trial or its number, by its number alone."""


class Catalogue:
    """Current and other reachable generations, and leases. Thread-safe: requests take leases on the event loop,
    give them back on the engine thread.

    A lease keeps a generation's factors in place until the request ends, whatever operators do meanwhile.
    *Staged* generations, and those that are tried out, are current for nobody: only a request that names the
    generation gets them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: dict[str, ExpertKey] = {}
        self._staged: set[ExpertKey] = set()
        self._tried: set[ExpertKey] = set()
        self._leases: dict[ExpertKey, int] = {}

    def switch(
        self,
        publish: Iterable[ExpertKey] = (),
        retire: Iterable[str] = (),
        trials: Iterable[ExpertKey] | None = None,
    ) -> list[ExpertKey]:
        """Change what is current, all at once; returns generations that nobody needs any more.

        Args:
            publish: become current, and are staged no more.
            retire: names that no new request gets; unknown ones are passed over.
            trials: all generations that are tried out from now on; None leaves those of before.
        """
        with self._lock:
            before = [*self._current.values(), *self._tried]
            for name in retire:
                self._current.pop(name, None)
            for key in publish:
                self._current[key.name] = key
                self._staged.discard(key)
                self._leases.setdefault(key, 0)
            if trials is not None:
                self._tried = set(trials)
                for key in self._tried:
                    self._leases.setdefault(key, 0)
            return self._collect(before)

    def stage(self, key: ExpertKey) -> None:
        """Keep a generation for requests that name it, until it is published or unstaged."""
        with self._lock:
            self._staged.add(key)
            self._leases.setdefault(key, 0)

    def unstage(self, key: ExpertKey) -> list[ExpertKey]:
        """Keep it no more for that; returns it if nobody needs it any more. One that is not staged is none."""
        with self._lock:
            self._staged.discard(key)
            return self._collect([key])

    def lease(
        self,
        gates: Mapping[str, float],
        generations: Mapping[str, int] | None = None,
        instead: ExpertKey | None = None,
    ) -> Pattern:
        """Bind expert names to their current generations and hold those; zero gates are dropped.

        Args:
            gates: name → weight.
            generations: name → the generation that is wanted: the current one, one that is staged or tried out.
            instead: a generation that is tried out, in place of the current one of its name.

        Raises:
            UnknownExpertError: a name is not registered, or another generation is; nothing is held then.
        """
        with self._lock:
            keys = {name: self._reach(name, generations or {}, instead) for name in gates}
            bound = sorted((keys[name], float(weight)) for name, weight in gates.items() if weight)
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

    def held(self) -> dict[ExpertKey, Reach]:
        """Every generation that stays without a lease, and how a request comes to it."""
        with self._lock:
            reach: dict[ExpertKey, Reach] = dict.fromkeys(self._staged, "staged")
            reach |= dict.fromkeys(self._tried, "trial")
            return reach | dict.fromkeys(self._current.values(), "active")

    def leases(self) -> dict[ExpertKey, int]:
        """Live requests of every generation that is held or still used."""
        with self._lock:
            return dict(self._leases)

    def _reach(self, name: str, generations: Mapping[str, int], instead: ExpertKey | None) -> ExpertKey:
        current = self._current.get(name)
        if instead is not None and instead.name == name and instead in self._tried:
            return instead
        if name in generations:
            wanted = ExpertKey(name, generations[name])
            if wanted == current or wanted in self._staged or wanted in self._tried:
                return wanted
        if current is None:
            known = ", ".join(sorted(self._current)) or "none"
            raise UnknownExpertError(f"no expert named {name!r}; registered: {known}", param=f"gates.{name}")
        if name in generations:
            raise UnknownExpertError(
                f"generation {generations[name]} of {name!r} is not live; {current.generation} is",
                param=f"gates.{name}",
            )
        return current

    def _collect(self, candidates: Iterable[ExpertKey]) -> list[ExpertKey]:
        freed = [
            key
            for key in dict.fromkeys(candidates)
            if self._leases.get(key) == 0
            and self._current.get(key.name) != key
            and key not in self._staged
            and key not in self._tried
        ]
        for key in freed:
            del self._leases[key]
        return freed
