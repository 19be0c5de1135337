"""The worker process as the server has it: started ahead of its first task, asked, and killed without regret.

One process does one task at a time and is kept for the next as long as it behaves: what is imported and opened stays
so. One that was killed, died or grew is replaced. It dies with the thread that started it: `start` is for the event
loop's own.
"""

import asyncio
import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from pydantic import ValidationError

from experts import errors as library
from experts.errors import ExpertsError
from experts.registry.work import Failure, Message, Setup, Step, Task, entry_script
from service.errors import LimitExceededError, RequestFailedError
from service.settings import ENV_PREFIX

_log = logging.getLogger(__name__)

A = TypeVar("A")

_LINE_BYTES = 2**24
"""Of one message from the process; a bundle's list of files is the longest."""

_KILL_SECONDS = 10
"""A killed process ends at once, unless it waits for a disk that does not answer."""

_GROWTH_BYTES = 256 * 2**20
"""A process that keeps so much more than at its start is replaced."""


class WorkerDiedError(Exception):
    """The process ended in the middle of a task, or before its first.

    Attributes:
        code: its exit code; negative is a signal.
    """

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the registry's worker process died (exit code {code})")
        self.code = code


class Worker:
    """One process. Made by `start`."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._first: int | None = None
        self._now = 0
        self._ready = False
        self._sound = True

    @classmethod
    async def start(cls, setup: Setup) -> "Worker":
        """A process that imports and opens what it needs; it can be asked at once, and answers when it is ready.

        Raises:
            OSError: no process can be made.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # The socket is the only thing that it inherits. Its group is its own, so that Ctrl-C is not for it;
                # the session is ours, since the kernel weighs niceness within one only.
                process = subprocess.Popen(  # noqa: S603 our own script
                    [sys.executable, "-P", str(entry_script()), str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,
                    env=_environment(setup.limits.threads),
                )
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_BYTES)
        worker = cls(process, reader, writer)
        try:
            worker._send(setup)
        except BaseException:
            await worker.kill()
            raise
        return worker

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """It can take another task: it lives, ended its last one in good order and keeps little memory of it."""
        grown = self._first is not None and self._now - self._first > _GROWTH_BYTES
        return self._sound and not grown and self._process.poll() is None

    async def ready(self) -> None:
        """Return when it waits for a task.

        Raises:
            WorkerDiedError: it does not come to that.
        """
        while not self._ready:
            message = await self._receive()
            if message.nbytes is None:
                raise WorkerDiedError(self._process.poll())
            self._now = message.nbytes
            self._first = message.nbytes if self._first is None else self._first
            self._ready = True

    async def ask(self, task: Task, kind: type[A], step: Callable[[Step], None]) -> A:
        """Have a task done. Whoever is cancelled meanwhile must `kill` it.

        Args:
            task: what to do.
            kind: of the answer.
            step: told how far it is.

        Raises:
            ExpertsError: it cannot be done, as the process says.
            LimitExceededError: it needs more memory than the process may have.
            RequestFailedError: a fault of ours.
            WorkerDiedError: the process ended.
        """
        self._sound = False
        await self.ready()
        self._ready = False
        self._send(task)
        with contextlib.suppress(ConnectionError):  # reading tells of the end
            await self._writer.drain()
        while True:
            message = await self._receive()
            if message.step is not None:
                step(message.step)
            elif message.failure is not None:
                self._sound = message.failure.kind not in ("memory", "fault")
                raise _raised(message.failure)
            elif isinstance(message.answer, kind):
                self._sound = True
                return message.answer
            else:
                raise RequestFailedError(
                    "The registry's worker process answered something else than was asked."
                )

    async def kill(self) -> None:
        """End it at once, whatever it does, and wait until nothing is left of it."""
        self._process.kill()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        try:
            await asyncio.to_thread(self._process.wait, _KILL_SECONDS)
        except subprocess.TimeoutExpired:
            _log.error("the registry's worker process %s does not end; it hangs in the kernel", self.pid)

    def _send(self, what: object) -> None:
        self._writer.write(pickle.dumps(what))

    async def _receive(self) -> Message:
        try:
            line = await self._reader.readline()
        except (ConnectionError, ValueError) as error:  # ValueError: no message is that long
            raise WorkerDiedError(self._process.poll()) from error
        if not line.endswith(b"\n"):
            raise WorkerDiedError(await self._code())
        try:
            return Message.model_validate_json(line)
        except ValidationError as error:
            _log.error("the registry's worker process says what nobody understands: %s", error)
            raise WorkerDiedError(self._process.poll()) from error

    async def _code(self) -> int | None:
        """Why its end of the socket is closed: the exit code, which comes a moment later."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return await asyncio.to_thread(self._process.wait, _KILL_SECONDS)
        return None


class Workers:
    """The one process that works, or waits to.

    Args:
        setup: what a new process is told; asked anew for each, since the bundle may have changed.
        warm: a process waits for the next task ahead of it.
    """

    def __init__(self, setup: Callable[[], Setup], *, warm: bool) -> None:
        self._setup = setup
        self._warm = warm
        self._spare: Worker | None = None
        self._for: Setup | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that waits; None while there is none, or it works."""
        return self._spare.pid if self._spare is not None else None

    async def warm_up(self) -> None:
        """Have a process wait, if that is wanted. A failure is left to the next task, which tells of it."""
        if not self._warm:
            return
        try:
            self._spare = await self._take()
        except OSError as error:
            _log.warning("no worker process waits for registrations: %s", error)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[Worker]:
        """A process for one job; it is killed if it was left in the middle of a task.

        Raises:
            WorkerDiedError: no process can be made.
        """
        try:
            worker = await self._take()
        except OSError as error:
            raise WorkerDiedError(None) from error
        try:
            yield worker
        finally:
            if self._warm and worker.usable:
                self._spare = worker
            else:
                await worker.kill()

    async def close(self) -> None:
        """End the process that waits."""
        spare, self._spare = self._spare, None
        if spare is not None:
            await spare.kill()

    async def _take(self) -> Worker:
        setup = self._setup()
        spare, self._spare = self._spare, None
        if spare is not None:
            if spare.usable and setup == self._for:
                return spare
            await spare.kill()
        self._for = setup
        return await Worker.start(setup)


def _environment(threads: int) -> dict[str, str]:
    """Ours without the settings, whose keys are none of its business, with our import path, and with as many threads
    as the process may use in whatever library makes some.
    """
    count = str(threads)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)},
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
    }


def _raised(failure: Failure) -> Exception:
    if failure.kind == "memory":
        return LimitExceededError(
            "The registration needs more memory than its process may have "
            f"({failure.message} bytes, TWINSERVE_REGISTRATION_BYTES); raise the limit, or ask for a smaller rank."
            if failure.message
            else "The registration needs more memory than there is; ask for a smaller rank."
        )
    kind = getattr(library, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, ExpertsError):
        return kind(failure.message)
    return RequestFailedError(
        f"A fault while registering ({failure.message}); the server's log tells more. Nothing was registered."
    )
