"""The tasks by kind. Each is a function of files and of what stays open between tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from experts.bundle import Bundle
from experts.errors import BundleError
from experts.registry.blobs import Blobs
from experts.registry.work.tasks import (
    Answer,
    BundleTask,
    RegisterTask,
    RouteTask,
    Stored,
    StoreTask,
)


class Desk(Protocol):
    """What a task works with."""

    @property
    def blobs(self) -> Blobs:
        """The store."""

    def bundle(self, path: Path, build_id: str) -> Bundle:
        """The bundle in a folder, which must be of that build."""

    def step(self, stage: str, share: float, tensor: str = "") -> None:
        """Tell how far a stage is, 0 to 1."""


def perform(task: object, desk: Desk) -> Answer:
    """Do a task.

    Raises:
        ExpertsError: it cannot be done; the message is for who asked.
    """
    from experts.registry.work.building import build
    from experts.registry.work.register import register
    from experts.registry.work.route import route

    match task:
        case RegisterTask():
            return register(task, desk)
        case RouteTask():
            return route(task, desk)
        case StoreTask():
            return store(task, desk)
        case BundleTask():
            return build(task, desk)
        case _:
            raise TypeError(f"a worker does no {type(task).__name__}")


def store(task: StoreTask, desk: Desk) -> Stored:
    """Put files into the blob store.

    Raises:
        BlobError: the store refuses, or a file is not what it was.
    """
    whole = sum(entry.nbytes for entry in task.files.values()) or 1
    done = 0
    for path, entry in task.files.items():
        desk.step("store", done / whole, path.name)
        desk.blobs.put(path, known=entry)
        done += entry.nbytes
    desk.step("store", 1)
    return Stored(count=len(task.files))


def check_build(bundle: Bundle, build_id: str) -> None:
    """Raise unless the bundle on disk is the one that is served.

    Raises:
        BundleError: it is another build.
    """
    if bundle.manifest.build_id != build_id:
        raise BundleError(f"{bundle.path} was rebuilt since the server opened it; restart the server")


def shares(bundle: Bundle, step: Callable[[str, float, str], None], stage: str) -> Callable[[str], None]:
    """A progress callback for work that goes over the bundle's parameters in their order, by their sizes."""
    whole = float(sum(bundle.shared.stored(name).nbytes for name in bundle.shared.names)) or 1.0
    until, total = {}, 0.0
    for name in bundle.shared.names:
        total += bundle.shared.stored(name).nbytes
        until[name] = total / whole

    def told(name: str) -> None:
        step(stage, until.get(name, 0.0), name)

    return told
