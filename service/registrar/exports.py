"""Experts in other programs' forms, made on the disk one at a time and removed when they have been sent."""

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from experts.bundle import ExpertWeights
from experts.registry.exporting import model_nbytes, write_gguf, write_model, write_peft, write_ready
from experts.registry.importing import mark_of
from experts.registry.records import Generation
from experts.registry.work import Scratch
from service.errors import QueueFullError, StorageFullError
from service.registrar.family import CatalogueFamily
from service.registrar.translate import translated

ExpertForm = Literal["peft", "gguf", "expert"]
Gated = Sequence[tuple[Generation, float]]

_TURN_SECONDS = 30.0

_KEPT_FREE = 256 << 20
"""Bytes of the disk that an export leaves to others."""

_LOWEST = 19


@dataclass(frozen=True, slots=True)
class Export:
    """A folder that is ready to be sent.

    Attributes:
        files: by the name that each has in the archive; in the folder they have the same.
    """

    folder: Path
    files: tuple[str, ...]


class _StoppedError(Exception):
    """Nobody waits for the export any more."""


class Exporter:
    """Makes exports on a thread of the lowest priority, so that whoever generates does not notice.

    Args:
        family: what is served now.
        root: folder for half-made files; other servers may use it too.
        turn_seconds: what an export waits for the one before it.
        free: bytes that the disk of a folder has left.
    """

    def __init__(
        self,
        family: Callable[[], CatalogueFamily],
        root: Path,
        turn_seconds: float = _TURN_SECONDS,
        free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._family = family
        self._root = root
        self._turn_seconds = turn_seconds
        self._free = free
        self._turn = asyncio.Lock()
        self._pool = ThreadPoolExecutor(1, "twinserve-export", _lowly)

    def expert(
        self, form: ExpertForm, generation: Generation
    ) -> contextlib.AbstractAsyncContextManager[Export]:
        """One generation over the shared expert; its folder lasts as long as the block.

        Raises:
            ExportRejectedError: the form cannot hold what the expert changes, or the architecture.
            WrongStateError: the generation is not ready, or of another bundle.
            QueueFullError: another export takes too long.
            StorageFullError: there is no room for it.
            RegistryUnavailableError: its files cannot be had.
        """

        def write(folder: Path, stop: threading.Event) -> None:
            family = self._family()
            weights = family.reader.expert(generation)
            self._require_room(_plain_nbytes(weights))
            mark = mark_of(family.bundle)
            if form == "peft":
                write_peft(family.bundle.shared, weights, mark, folder)
            elif form == "gguf":
                write_gguf(family.bundle.shared, weights, mark, folder / f"{generation.name}.gguf")
            else:
                write_ready(family.reader.folder(generation), mark, folder)

        return self._made(write)

    def model(self, gated: Gated) -> contextlib.AbstractAsyncContextManager[Export]:
        """The shared expert with these gates merged in; its folder lasts as long as the block.

        Raises:
            WrongStateError, QueueFullError, StorageFullError, RegistryUnavailableError: as `expert`.
            ExportRejectedError: the sum is beyond what the model's dtype can hold.
        """

        def write(folder: Path, stop: threading.Event) -> None:
            family = self._family()
            shared = family.bundle.shared
            self._require_room(model_nbytes(shared))
            mix = [(family.reader.expert(generation), gate) for generation, gate in gated]

            def go_on(_: str) -> None:
                if stop.is_set():
                    raise _StoppedError

            write_model(shared, mix, folder, go_on)

        return self._made(write)

    @contextlib.asynccontextmanager
    async def _made(self, write: Callable[[Path, threading.Event], None]) -> AsyncIterator[Export]:
        async with self._in_turn():
            scratch = contextlib.ExitStack()
            stop = threading.Event()

            def make() -> Export:
                with translated():
                    folder = scratch.enter_context(Scratch.opened(self._root)).folder("export")
                    write(folder, stop)
                    return Export(folder, tuple(sorted(path.name for path in folder.iterdir())))

            loop = asyncio.get_running_loop()
            begun = loop.run_in_executor(self._pool, make)
            try:
                yield await asyncio.shield(begun)
            finally:
                stop.set()
                # The pool's one thread ends what it makes before it removes it.
                removed = loop.run_in_executor(self._pool, scratch.close)
                await asyncio.shield(asyncio.gather(begun, removed, return_exceptions=True))

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._turn_seconds):
                await self._turn.acquire()
        except TimeoutError:
            raise QueueFullError(
                "Another export is being made or sent; one is made at a time. Try again later.",
                retry_after=self._turn_seconds,
            ) from None
        try:
            yield
        finally:
            self._turn.release()

    def _require_room(self, nbytes: int) -> None:
        free = self._free(self._root)
        if free < nbytes + _KEPT_FREE:
            raise StorageFullError(
                f"The export takes {nbytes} bytes on the server's disk, of which {free} are free; make room in "
                "TWINSERVE_STATE_DIR."
            )


def _plain_nbytes(expert: ExpertWeights) -> int:
    """Of an expert's factors in float32; a tied head's come twice."""
    factors = sum(4 * (factors.U.numel() + factors.Vh.numel()) for factors in expert.factors.values())
    return 2 * factors + 2 * sum(vector.nbytes for vector in expert.exact.values())


def _lowly() -> None:
    """Of this thread: Linux keeps niceness by thread."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
