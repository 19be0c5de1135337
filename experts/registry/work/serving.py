"""The worker process from its first import to its last task: one socket, one task at a time."""

import logging
import os
import pickle
import select
import socket
import threading
import time
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch

from experts.bundle import Bundle
from experts.errors import ExpertsError, StorageFullError
from experts.registry.blobs import Blobs
from experts.registry.work import stages
from experts.registry.work.limits import give_back_memory, is_full, is_shortage, limit_memory, own_memory
from experts.registry.work.tasks import Failure, Message, Setup, Step

_log = logging.getLogger(__name__)

T = TypeVar("T")

_STEP_SECONDS = 0.05
"""At most that often the server hears of a step within a stage."""


def serve(descriptor: int) -> None:
    """Do what comes over the socket until its other end is closed."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s registry worker: %(message)s")
    with socket.socket(fileno=descriptor) as link:
        threading.Thread(target=_leave_with, args=(link,), name="hangup", daemon=True).start()
        with link.makefile("rb") as inbox, link.makefile("wb") as outbox:
            try:
                _serve(inbox, outbox)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return


def _serve(inbox: BinaryIO, outbox: BinaryIO) -> None:
    setup = _receive(inbox, Setup)
    torch.set_num_threads(setup.limits.threads)
    limit_memory(setup.limits.nbytes)
    desk = _Desk(setup, outbox)
    while True:
        give_back_memory()
        desk.send(Message(nbytes=own_memory()))
        task = _receive(inbox, object)
        desk.send(desk.carry_out(task))


class _Desk:
    """What stays open between tasks, and the way back to the server."""

    def __init__(self, setup: Setup, outbox: BinaryIO) -> None:
        self._outbox = outbox
        self._setup = setup
        self._blobs: Blobs | None = None
        self._bundles: dict[Path, Bundle] = {}
        self._last = ("", 0.0)
        try:
            # Opened so that the first task finds headers and pages warm; whatever is wrong, a task will say.
            self._bundle(setup.bundle).base_delta  # noqa: B018
        except ExpertsError as error:
            _log.warning("%s", error)

    def send(self, message: Message) -> None:
        self._outbox.write(message.model_dump_json(exclude_none=True).encode() + b"\n")
        self._outbox.flush()

    def step(self, stage: str, share: float, tensor: str = "") -> None:
        """Tell of a step, unless one of the same stage was told just now."""
        told, at = self._last
        now = time.monotonic()
        if stage != told or share >= 1 or now - at >= _STEP_SECONDS:
            self._last = (stage, now)
            self.send(Message(step=Step(stage=stage, share=min(max(share, 0.0), 1.0), tensor=tensor[:200])))

    def carry_out(self, task: object) -> Message:
        """Its answer, or why there is none."""
        try:
            return Message(answer=stages.perform(task, self))
        except Exception as error:  # noqa: BLE001 the server is told, and the next task is another
            return Message(failure=self._failure(error))

    def _failure(self, error: Exception) -> Failure:
        if is_shortage(error):
            return Failure(kind="memory", message=str(self._setup.limits.nbytes or ""))
        if isinstance(error, ExpertsError):
            return Failure(kind=type(error).__name__, message=str(error))
        if is_full(error):
            return Failure(
                kind=StorageFullError.__name__,
                message="the disk has no room for half-made files; make some, for instance with "
                "`twinserve registry gc`, and retry the job",
            )
        _log.exception("a task failed")
        return Failure(kind="fault", message=f"{type(error).__name__}: {error}")

    @property
    def blobs(self) -> Blobs:
        """The store."""
        if self._blobs is None:
            at = self._setup.store
            self._blobs = Blobs.open(at.url, at.cache, at.options)
        return self._blobs

    def bundle(self, path: Path, build_id: str) -> Bundle:
        """The bundle that a task is for.

        Raises:
            BundleError: it cannot be read, or is another build.
        """
        bundle = self._bundle(path)
        if bundle.manifest.build_id != build_id:
            self._bundles.clear()
            bundle = self._bundle(path)
        stages.check_build(bundle, build_id)
        return bundle

    def _bundle(self, path: Path) -> Bundle:
        if path not in self._bundles:
            self._bundles = {path: Bundle.open(path, verify=False, lazy=True)}
        return self._bundles[path]


def _receive(inbox: BinaryIO, kind: type[T]) -> T:
    received = pickle.load(inbox)  # noqa: S301 from the server, which started us
    assert isinstance(received, kind)
    return received


def _leave_with(link: socket.socket) -> None:
    """End the process at once when the other end of the link is closed, whatever it is doing."""
    poll = select.poll()
    poll.register(link, select.POLLRDHUP)
    while not poll.poll():
        pass
    os._exit(1)
