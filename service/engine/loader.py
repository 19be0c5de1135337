"""Loads experts beside the engine thread: from the bundle or from host memory, with a pause after a failure."""

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from experts.bundle import ExpertWeights
from service.core import ExpertKey
from service.engine.background import background_thread
from service.engine.host_cache import HostCache, copied
from service.errors import ExpertUnavailableError
from service.gating.resident import ResidentExpert

logger = logging.getLogger(__name__)

_LONGEST_RETRY_SECONDS = 60.0


class ExpertSource(Protocol):
    """Where experts come from that are not on the device."""

    def load(self, key: ExpertKey) -> ExpertWeights:
        """Exactly that generation; called on the executor. Raises whatever it likes if it cannot be had."""


class Generations(Protocol):
    """What reads experts by name and number, as `ExpertLoader` does."""

    def load(self, name: str, generation: int) -> ExpertWeights:
        """Exactly that generation. Raises ExpertsError if it cannot be had."""
        ...


class BundleSource:
    """The experts of a bundle on disk, or of a catalogue."""

    def __init__(self, loader: Generations) -> None:
        self._loader = loader

    def load(self, key: ExpertKey) -> ExpertWeights:
        """Read one generation. Raises ExpertsError."""
        return self._loader.load(key.name, key.generation)


class Preparer(Protocol):
    """What the loader needs of `ExpertBank`; both are safe on any thread."""

    @property
    def device(self) -> torch.device:
        """Where factors live."""

    def prepare(self, weights: ExpertWeights) -> ResidentExpert:
        """Device tensors of an expert. Raises ExpertRejectedError if it does not fit."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one load made.

    Attributes:
        expert: on the device.
        copy: for the host cache; None where it keeps none, or has it.
        seconds: what it took.
    """

    expert: ResidentExpert
    copy: ResidentExpert | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Collected:
    """Loads that have ended: what they made, and how many made nothing."""

    loaded: Mapping[ExpertKey, Loaded]
    failures: int


@dataclass(frozen=True, slots=True)
class _Failure:
    attempts: int
    retry_at: float


def loader_thread() -> ThreadPoolExecutor:
    """The one thread for loading; it gives way to the engine's."""
    return background_thread("twinserve-loader")


class Loader:
    """Runs loads on an executor and remembers what failed. Its methods are for the engine thread.

    Args:
        executor: `loader_thread()` but in tests. The caller shuts it down, after the engine thread has ended.
        host: copies of experts that may be needed again.
        retry_seconds: how long a failed expert is left alone; doubles with each failure, up to a minute.
        clock: monotonic seconds.

    Attributes:
        on_loaded: called when a load has ended, on any thread; must not raise.
    """

    def __init__(
        self,
        bank: Preparer,
        source: ExpertSource,
        executor: Executor,
        *,
        host: HostCache | None = None,
        retry_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_loaded: Callable[[], None] = lambda: None
        self._bank = bank
        self._source = source
        self._executor = executor
        self._host = host or HostCache()
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._loading: dict[ExpertKey, Future[Loaded]] = {}
        self._failures: dict[ExpertKey, _Failure] = {}
        self._kept: dict[ExpertKey, ExpertWeights] = {}

    def __len__(self) -> int:
        return len(self._loading)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._loading

    def start(self, key: ExpertKey) -> None:
        """Begin to load an expert."""
        future = self._executor.submit(self._load, key, self._host.get(key), self._kept.get(key))
        self._loading[key] = future
        future.add_done_callback(lambda _: self.on_loaded())

    def collect(self) -> Collected:
        """Take what has ended since the last call; those that failed are `unavailable` from now on."""
        loaded: dict[ExpertKey, Loaded] = {}
        failures = 0
        for key in [key for key, future in self._loading.items() if future.done()]:
            future = self._loading.pop(key)
            try:
                loaded[key] = future.result()
            except Exception as error:
                # Files and their paths are the operator's business, not the client's.
                logger.exception("expert %s cannot be loaded", key, exc_info=error)
                self._fail(key)
                failures += 1
                continue
            self._failures.pop(key, None)
            copy = loaded[key].copy
            if copy is not None:
                self._host.put(copy)
        return Collected(loaded, failures)

    def unavailable(self) -> dict[ExpertKey, ExpertUnavailableError]:
        """Experts that failed so recently that they are left alone for now."""
        if not self._failures:
            return {}
        now = self._clock()
        return {
            key: _unavailable(key, failure.retry_at - now)
            for key, failure in self._failures.items()
            if failure.retry_at > now
        }

    def abandon(self, key: ExpertKey) -> None:
        """What is being loaded under that key is not wanted, and earlier failures do not count."""
        self._failures.pop(key, None)
        future = self._loading.pop(key, None)
        if future is not None:
            future.cancel()

    def keep(self, weights: ExpertWeights) -> None:
        """Load this generation from here: the source does not know it, or not yet."""
        self._kept[ExpertKey(weights.name, weights.generation)] = weights

    def discard(self, key: ExpertKey) -> None:
        """From now on the source has the generation."""
        self._kept.pop(key, None)

    def forget(self, key: ExpertKey) -> None:
        """The generation exists no more."""
        self.abandon(key)
        self.discard(key)
        self._host.forget(key)

    def _load(self, key: ExpertKey, copy: ResidentExpert | None, kept: ExpertWeights | None) -> Loaded:
        """On the executor."""
        started = time.monotonic()
        if copy is not None:
            return Loaded(copied(copy, self._bank.device), None, time.monotonic() - started)
        expert = self._bank.prepare(self._source.load(key) if kept is None else kept)
        if expert.key != key:
            raise LookupError(f"asked for {key}, got {expert.key}")
        spare = copied(expert, torch.device("cpu")) if expert.nbytes <= self._host.max_bytes else None
        return Loaded(expert, spare, time.monotonic() - started)

    def _fail(self, key: ExpertKey) -> None:
        earlier = self._failures.get(key)
        attempts = earlier.attempts + 1 if earlier is not None else 1
        delay = min(self._retry_seconds * 2.0 ** min(attempts - 1, 16), _LONGEST_RETRY_SECONDS)
        self._failures[key] = _Failure(attempts, self._clock() + delay)


def _unavailable(key: ExpertKey, seconds: float) -> ExpertUnavailableError:
    return ExpertUnavailableError(
        f"expert {key.name!r} (generation {key.generation}) cannot be loaded now, the server's log says why; "
        "try again later, or without it",
        param="model",
        retry_after=seconds,
    )
