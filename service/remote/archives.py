"""An export's tar archive → a folder, trusting nothing that the archive says of itself."""

import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import httpx

from service.remote.server import RemoteError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_MAX_MEMBERS = 10_000
_COPY = 1 << 20


def unpack(answer: httpx.Response, target: Path, show: Callable[[int], None]) -> list[str]:
    """Write the files of a streamed archive to `target`, which appears when all of them are whole.

    Args:
        answer: the response, its body not read yet.
        target: a folder that is not there yet.
        show: gets the number of bytes received.

    Returns:
        The files' names.

    Raises:
        RemoteError: it is no archive of plain files in one folder, or cannot be written.
    """
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        reader = _Reader(answer.iter_raw(_COPY), show)
        with tarfile.open(fileobj=cast("IO[bytes]", reader), mode="r|") as archive:
            names = [_extract(archive, member, scratch) for member in _members(archive)]
        reader.drain()
        scratch.rename(target)
    except tarfile.TarError as error:
        raise RemoteError(f"the answer is no tar archive ({error})", "bad_archive") from error
    except OSError as error:
        raise RemoteError(f"{target} cannot be written: {error.strerror or error}", "not_written") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return names


def top_of(answer: httpx.Response) -> str:
    """The archive's own name, if it is one that a folder may have; else "export"."""
    found = re.search(r'filename="([^"]+)\.tar"', answer.headers.get("content-disposition", ""))
    return found[1] if found and _NAME.fullmatch(found[1]) else "export"


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for count, member in enumerate(archive):
        if count >= _MAX_MEMBERS:
            raise RemoteError(f"the archive holds more than {_MAX_MEMBERS} files", "bad_archive")
        yield member


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> str:
    """One plain file; links, devices, folders and names with more than one folder are refused."""
    top, _, name = member.name.partition("/")
    source = archive.extractfile(member) if member.isreg() else None
    if source is None or not _NAME.fullmatch(top) or not _NAME.fullmatch(name):
        raise RemoteError(
            f"the archive holds {ascii(member.name)[:80]}, which is no plain file", "bad_archive"
        )
    with (folder / name).open("xb") as file:
        shutil.copyfileobj(source, file, _COPY)
    return name


class _Reader:
    """Chunks as a file that is read once."""

    def __init__(self, chunks: Iterator[bytes], show: Callable[[int], None]) -> None:
        self._chunks = chunks
        self._show = show
        self._waiting = b""
        self._seen = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end alone."""
        parts = [self._waiting]
        held = len(self._waiting)
        while held < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            self._seen += len(chunk)
            self._show(self._seen)
            parts.append(chunk)
            held += len(chunk)
        whole = b"".join(parts)
        self._waiting = whole[size:]
        return whole[:size]

    def drain(self) -> None:
        """To the end, where a connection that broke would show."""
        while self.read(_COPY):
            pass
