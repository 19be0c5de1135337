"""Sending files in pieces; an upload that was interrupted, also by this program's end, goes on where it stopped."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.remote.server import RefusedError, Server
from service.remote.sources import fingerprint

_PIECE = 8 << 20
_REMEMBERED = 100


def send(
    server: Server,
    files: dict[str, Path],
    remembered: "Remembered",
    show: Callable[[int, int], None],
    piece: int = _PIECE,
) -> str:
    """Have all files on the server and return the upload's id.

    Args:
        server: where to.
        files: name → path.
        remembered: uploads that were begun.
        show: gets bytes that are there and bytes in all.
        piece: most bytes of one request.

    Raises:
        RefusedError: a name or size that the server does not take.
        UnreachableError: it does not answer any more; the same call goes on later.
    """
    identity = f"{server.url} {fingerprint(files)}"
    upload = _known(server, remembered.get(identity))
    if upload is None:
        upload = server.ask("POST", "/admin/uploads", {})
        remembered.put(identity, str(upload["id"]))
    there = {entry["name"]: int(entry["bytes"]) for entry in upload["files"]}
    total = sum(path.stat().st_size for path in files.values())
    sent = sum(min(there.get(name, 0), path.stat().st_size) for name, path in files.items())
    show(sent, total)
    if upload["state"] == "open":
        for name, path in files.items():
            for count in _file(server, str(upload["id"]), name, path, there.get(name, 0), piece):
                sent += count
                show(sent, total)
    return str(upload["id"])


def _known(server: Server, upload: str | None) -> Any:
    if upload is None:
        return None
    try:
        return server.ask("GET", f"/admin/uploads/{upload}")
    except RefusedError as error:
        if error.status != 404:
            raise
        return None


def _file(server: Server, upload: str, name: str, path: Path, offset: int, piece: int) -> Iterator[int]:
    """The bytes of each piece, once it has arrived."""
    size = path.stat().st_size
    address = f"/admin/uploads/{upload}/files/{name}"
    with path.open("rb") as file:
        while offset < size or not size:
            file.seek(offset)
            content = file.read(piece)
            try:
                told = server.ask("PUT", address, query={"offset": offset}, content=content)
            except RefusedError as error:
                if error.code != "offset_conflict":
                    raise
                # An answer was lost, and what it told of had arrived.
                described = server.ask("GET", f"/admin/uploads/{upload}")
                told = next(entry for entry in described["files"] if entry["name"] == name)
                if not offset < int(told["bytes"]) <= size:
                    raise
            yield int(told["bytes"]) - offset
            offset = int(told["bytes"])
            if not size:
                return


class Remembered:
    """Uploads that were begun on this machine, in one small file; nothing is lost with it but time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def of_user(cls) -> "Remembered":
        """In the user's cache folder."""
        root = os.environ.get("XDG_CACHE_HOME")
        return cls((Path(root) if root else Path.home() / ".cache") / "twinserve" / "uploads.json")

    def get(self, identity: str) -> str | None:
        """The upload that was begun for it."""
        found = self._read().get(identity)
        return found if isinstance(found, str) else None

    def put(self, identity: str, upload: str) -> None:
        """Remember one; the oldest are forgotten."""
        known = self._read()
        known.pop(identity, None)
        known[identity] = upload
        self._write(dict(list(known.items())[-_REMEMBERED:]))

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a home that cannot be written costs resuming alone
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(known, indent=1), encoding="utf-8")
            scratch.replace(self._path)
