"""The engine thread: takes commands between steps, runs steps, hands out what they made."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from service.core import Event, RequestStats, StepStats
from service.engine.engine import Engine
from service.engine.roster import StepResult
from service.errors import EngineDeadError, ShuttingDownError, TwinserveError

logger = logging.getLogger(__name__)

Command = Callable[[StepResult], None]
"""Something to do on the engine thread between two steps; it may add events."""


ENGINE_THREAD = "twinserve-engine"
"""The name of every engine's thread."""

_JOIN_SECONDS = 60

_STALL_SECONDS = 0.05
"""How long an engine without anything to compute sleeps before it looks at its deadlines."""


class EngineBrokenError(RuntimeError):
    """Nothing can be computed any more."""


class StatsSink(Protocol):
    """Who is told what happened; called on the engine thread."""

    def on_step(self, stats: StepStats) -> None:
        """After every step."""

    def on_request(self, stats: RequestStats) -> None:
        """After every ended request."""


class EngineThread:
    """Owns the engine from `start` on: nothing else may touch it but through `send`.

    Args:
        deliver: called on this thread with the events of a step, in order.
        ended: called once on this thread when it is over, with the error for whoever still waits.
        threads: intra-op threads of the engine; None leaves torch's choice.

    Attributes:
        failure: why the engine has ended; None while it runs.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[tuple[str, Event]]], None],
        ended: Callable[[TwinserveError], None],
        stats: StatsSink | None,
        threads: int | None,
    ) -> None:
        self.failure: str | None = None
        self._engine = engine
        self._deliver = deliver
        self._ended = ended
        self._stats = stats
        self._threads = threads
        self._wake = threading.Condition()
        self._inbox: deque[Command] = deque()
        self._closing = False
        self._nudged = False
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The thread runs and has not failed."""
        return self.failure is None and self._thread.is_alive()

    def send(self, command: Command) -> None:
        """Have `command` run between two steps; any thread.

        Raises:
            EngineDeadError: the thread has ended.
        """
        with self._wake:
            if self.failure is not None:
                raise self.dead()
            self._inbox.append(command)
            self._wake.notify()

    def nudge(self) -> None:
        """Something that a stalled engine waits for may have come; any thread, any time."""
        with self._wake:
            self._nudged = True
            self._wake.notify()

    def dead(self) -> EngineDeadError:
        """The error for whoever comes too late."""
        return EngineDeadError(f"the engine has stopped ({self.failure or 'closed'}); restart the server")

    def close(self) -> None:
        """End the thread; live requests get an error. Blocks until it has ended, a minute at most."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            logger.error("the engine thread is stuck in a step and is left behind")

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        error: TwinserveError = ShuttingDownError("the server has stopped", retry_after=1.0)
        failure = "closed"
        try:
            while self._turn():
                pass
        except BaseException as fault:
            logger.exception("the engine has died")
            failure = f"{type(fault).__name__}: {fault}"
            error = EngineDeadError(f"the engine has stopped ({failure}); restart the server")
        with self._wake:
            self.failure = failure
            commands = list(self._inbox)
            self._inbox.clear()
        self._end(commands, error)
        # Whoever keeps this thread's owner must not keep weights and KV cache with it.
        del self._engine

    def _turn(self) -> bool:
        """Take commands, run a step, send its events; False when it is time to stop."""
        with self._wake:
            while not (self._inbox or self._closing or self._engine.busy):
                self._wake.wait()
            if self._engine.stalled and not (self._inbox or self._closing or self._nudged):
                # Requests wait for experts or blocks that others bring; deadlines pass meanwhile.
                self._wake.wait(_STALL_SECONDS)
            self._nudged = False
            if self._closing:
                return False
            commands = list(self._inbox)
            self._inbox.clear()
        self._obey(commands)
        if self._engine.busy:
            result = self._engine.step()
            self._report(result)
            if result.broken is not None:
                raise EngineBrokenError(result.broken)
        return True

    def _obey(self, commands: list[Command]) -> None:
        """Run all commands, whatever one of them does, and hand out what they made.

        Raises:
            Exception: the first that a command raised; the engine's state is unknown then.
        """
        result, fault = StepResult(), None
        for command in commands:
            try:
                command(result)
            except Exception as error:
                logger.exception("a command failed on the engine thread")
                fault = fault or error
        self._report(result)
        if fault is not None:
            raise fault

    def _end(self, commands: list[Command], error: TwinserveError) -> None:
        """Nobody may wait for ever: late requests are taken in, and then everything is ended."""
        try:
            with contextlib.suppress(Exception):
                self._obey(commands)
            result = StepResult()
            self._engine.fail_all(error, result)
            self._report(result)
        finally:
            self._ended(error)

    def _report(self, result: StepResult) -> None:
        if result.events:
            self._deliver(result.events)
        if self._stats is not None:
            for ended in result.ended:
                self._stats.on_request(ended)
            if result.stats is not None:
                self._stats.on_step(result.stats)
