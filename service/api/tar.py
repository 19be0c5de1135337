"""A folder's files as a tar archive that is sent while it is read: no second copy, as fast as the client takes it."""

import asyncio
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_BLOCK = 512
_RECORD = 20 * _BLOCK
"""An archive is a multiple of it, ended by two empty blocks."""

_READ = 256 * 1024


class TarStream(Response):
    """Sends plain files below one top folder, then `close`s, however it ends.

    The length is announced, so a client can tell an archive that was cut off.

    Args:
        folder: holds the files.
        files: their names.
        top: the archive's folder, and the name that a browser saves it by.
        close: called once at the end; whoever hung up is not waited for.
    """

    media_type = "application/x-tar"

    def __init__(
        self, folder: Path, files: Sequence[str], top: str, close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(headers={"Content-Disposition": f'attachment; filename="{top}.tar"'})
        self._members = [(folder / name, _header(folder / name, f"{top}/{name}")) for name in files]
        self._close = close
        self._tail = -sum(_padded(path) + len(header) for path, header in self._members) % _RECORD
        if self._tail < 2 * _BLOCK:
            self._tail += _RECORD
        whole = sum(_padded(path) + len(header) for path, header in self._members) + self._tail
        self.headers["content-length"] = str(whole)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the archive ends or the client hangs up."""
        work = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
            await self._close()
        if isinstance(results[0], Exception):
            raise results[0]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": bytes(self._tail), "more_body": False})

    async def _parts(self) -> AsyncIterator[bytes]:
        for path, header in self._members:
            yield header
            left = path.stat().st_size
            with path.open("rb") as file:
                padding = bytes(-left % _BLOCK)
                while left:
                    part = await asyncio.to_thread(file.read, min(left, _READ))
                    if not part:
                        raise OSError(f"{path.name} became shorter while it was sent")
                    left -= len(part)
                    yield part
            yield padding


def _header(path: Path, name: str) -> bytes:
    """Nothing of this machine: no owner, no time."""
    info = tarfile.TarInfo(name)
    info.size = path.stat().st_size
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(path: Path) -> int:
    size = path.stat().st_size
    return size + -size % _BLOCK


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
