"""Bodies that go to the disk as they come: none is ever held whole."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from experts.registry.sources import FileWriter
from service.api.body import content_type
from service.api.errors import ClientGoneError
from service.errors import InvalidRequestError, LimitExceededError, TwinserveError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MULTIPART = "multipart/form-data"

_FILES_PATH = re.compile(r"/admin/uploads/[^/]+/files/.+", re.DOTALL)
_BLOCK = 2**20
"""Bytes that are handed to the disk at once."""

_MAX_PARTS = 1000
_MAX_HEADERS = 16
_MAX_HEADER = 4096

Open = Callable[[str], AbstractContextManager[FileWriter]]
"""File name → its writer."""


def is_streamed(scope: Scope) -> bool:
    """Whether a request brings files, which the bound of ordinary bodies is not for."""
    if scope["method"] == "PUT":
        return bool(_FILES_PATH.fullmatch(scope["path"]))
    return (
        scope["method"] == "POST"
        and scope["path"] == "/admin/uploads"
        and content_type(Headers(scope=scope)) == MULTIPART
    )


async def blocks(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about a megabyte.

    Raises:
        ClientGoneError: the client hung up before its end.
        SlowRequestError, BodyTooLargeError: as `LimitBody`.
    """
    waiting = bytearray()
    try:
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= _BLOCK:
                yield bytes(waiting)
                waiting.clear()
    except (ClientDisconnect, TwinserveError) as error:
        # What has come counts, whatever ends the body.
        if waiting:
            yield bytes(waiting)
        if isinstance(error, TwinserveError):
            raise
        raise ClientGoneError from error
    if waiting:
        yield bytes(waiting)


async def read_all(request: Request) -> bytes:
    """A small body.

    Raises:
        ClientGoneError: the client hung up before its end.
    """
    return b"".join([block async for block in blocks(request)])


async def write_raw(request: Request, writer: FileWriter) -> None:
    """The body is the file.

    Raises:
        ClientGoneError: the client hung up; what came before counts.
        SourceTooLargeError, StorageFullError, BlobError: it cannot be kept.
    """
    async for block in blocks(request):
        await asyncio.to_thread(writer.write, block)


async def write_parts(request: Request, open_file: Open) -> int:
    """The body is a form whose parts are files; returns their number.

    Raises:
        InvalidRequestError, LimitExceededError: it is no such form, or has fields that are not files.
        ClientGoneError: the client hung up.
        ExpertsError: a name or file that is refused, or cannot be kept.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequestError("The Content-Type of a form must name its boundary.")
    form = _Form(open_file)
    with form.files:
        try:
            parser = MultipartParser(
                boundary, form.callbacks(), max_header_count=_MAX_HEADERS, max_header_size=_MAX_HEADER
            )
            async for block in blocks(request):
                await asyncio.to_thread(parser.write, block)
            parser.finalize()
        except FormParserError as error:
            raise InvalidRequestError(f"The body is not a well-formed multipart form: {error}.") from error
        if not form.ended:
            raise InvalidRequestError("The body ends before the form's last boundary; send it again.")
    return form.count


@dataclass(slots=True)
class _Form:
    """A form being read: what the parser tells goes to the file of the part at hand.

    Attributes:
        files: closes the file of the part at hand.
        ended: the last boundary has come.
    """

    open_file: Open
    files: ExitStack = field(default_factory=ExitStack)
    count: int = 0
    ended: bool = False
    writer: FileWriter | None = None
    disposition: bytes = b""
    _name: bytes = b""
    _value: bytes = b""

    def callbacks(self) -> "MultipartCallbacks":
        """For the parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self.count += 1
        if self.count > _MAX_PARTS:
            raise LimitExceededError(f"The form has more than {_MAX_PARTS} parts.")
        self.disposition = self._name = self._value = b""

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self.disposition = self._value
        elif self._name.lower() in (b"content-encoding", b"content-transfer-encoding"):
            raise InvalidRequestError("A part of the form is encoded; send files as they are.")
        self._name = self._value = b""

    def _open(self) -> None:
        _, options = parse_options_header(self.disposition)
        if b"filename" not in options:
            raise InvalidRequestError(
                "A part of the form is no file; give every part a file name, and nothing else in the form."
            )
        name = options[b"filename"].decode(errors="replace")
        self.writer = self.files.enter_context(self.open_file(name))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self.writer is not None:
            self.writer.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self.writer = None
        self.files.close()

    def _finish(self) -> None:
        self.ended = True
