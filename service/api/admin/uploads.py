"""`/admin/uploads`: a fine-tune's files, sent at once as a form or one by one in pieces, then registered by id."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, HTTPException, Query, Request, Response

from experts.registry.sources import Upload
from service.api.admin.asking import AdminParts, admin_refusals
from service.api.admin.streamed import MULTIPART, read_all, write_parts, write_raw
from service.api.admin.telling import json_answer
from service.api.body import content_type, parse_json
from service.api.wire.registry import DeletedAnswer
from service.api.wire.uploads import UploadAnswer, UploadedFile, UploadList
from service.errors import (
    BodyTooLargeError,
    ExpertRejectedError,
    InvalidRequestError,
    OffsetConflictError,
    QueueFullError,
    RecordNotFoundError,
    SourceNotAllowedError,
    StorageFullError,
    WrongStateError,
)
from service.registrar.sources import refusing

T = TypeVar("T")

_JSON = "application/json"

_BEGIN_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            _JSON: {
                "schema": {"type": "object", "additionalProperties": False, "properties": {}},
                "example": {},
            },
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                        }
                    },
                }
            },
        },
    }
}
_FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_STORING = (
    InvalidRequestError,
    ExpertRejectedError,
    SourceNotAllowedError,
    WrongStateError,
    BodyTooLargeError,
    StorageFullError,
)


def _answer(upload: Upload) -> UploadAnswer:
    return UploadAnswer(
        id=upload.id,
        state="registered" if upload.registered else "open",
        files=[UploadedFile(name=name, bytes=size) for name, size in sorted(upload.files.items())],
        bytes=upload.nbytes,
        expires_in_seconds=round(upload.expires_in, 3),
    )


async def _ask(call: Callable[[], T]) -> T:
    """What the store says, off the event loop."""

    def asked() -> T:
        with refusing("upload"):
            return call()

    return await asyncio.to_thread(asked)


def add_routes(router: APIRouter, parts: AdminParts) -> None:
    """Put `/admin/uploads` on `router`."""
    sources = parts.registrar.sources
    store = sources.uploads

    @router.post(
        "/admin/uploads",
        status_code=201,
        response_model=UploadAnswer,
        responses=admin_refusals(*_STORING, QueueFullError),
        openapi_extra=_BEGIN_BODY,
    )
    async def begin(request: Request) -> Response:
        """Begin an upload; a form of files (`multipart/form-data`) is one at once."""
        kind = content_type(request.headers)
        if kind == MULTIPART:
            upload = await _ask(store.create)
            try:
                with refusing("file"):
                    count = await write_parts(request, lambda name: store.writing(upload.id, name, 0))
                if not count:
                    raise InvalidRequestError("The form has no files.", param="file")
            except BaseException:
                # A form is whole or nothing.
                await asyncio.shield(asyncio.to_thread(_forget, lambda: store.remove(upload.id)))
                raise
            return json_answer(_answer(await _ask(lambda: store.describe(upload.id))), 201)
        if kind != _JSON:
            raise HTTPException(
                415, f"Send {_JSON} or {MULTIPART} as the Content-Type, not {kind or 'none'}."
            )
        body = await read_all(request)
        if parse_json(body or b"{}", parts.settings.max_json_depth) != {}:
            raise InvalidRequestError("An upload begins with the empty object {}; it takes no fields.")
        return json_answer(_answer(await _ask(store.create)), 201)

    @router.get("/admin/uploads", response_model=UploadList, responses=admin_refusals())
    async def list_uploads() -> Response:
        """List the uploads of this server."""
        found = await _ask(store.all)
        return json_answer(UploadList(data=[_answer(upload) for upload in found]))

    @router.get(
        "/admin/uploads/{upload_id}",
        response_model=UploadAnswer,
        responses=admin_refusals(RecordNotFoundError),
    )
    async def get_upload(upload_id: str) -> Response:
        """Tell what of an upload is safe on the disk, so that it can go on there."""
        return json_answer(_answer(await _ask(lambda: store.describe(upload_id))))

    @router.put(
        "/admin/uploads/{upload_id}/files/{name:path}",
        response_model=UploadedFile,
        responses=admin_refusals(RecordNotFoundError, OffsetConflictError, *_STORING),
        openapi_extra=_FILE_BODY,
    )
    async def put_file(
        request: Request,
        upload_id: str,
        name: str,
        offset: Annotated[int, Query(ge=0, le=2**53, description="bytes of the file that are there")] = 0,
    ) -> Response:
        """Append the body to a file; it is safe on the disk when the answer comes."""
        if content_type(request.headers) == MULTIPART:
            raise HTTPException(415, "Send the file's bytes as they are, or a form to POST /admin/uploads.")
        with refusing("name"):
            writing = store.writing(upload_id, name, offset)
            writer = await asyncio.to_thread(writing.__enter__)
            try:
                await write_raw(request, writer)
            finally:
                # Also where the client hung up: what has come counts, and is synced off the event loop.
                await asyncio.shield(asyncio.to_thread(writing.__exit__, None, None, None))
        return json_answer(UploadedFile(name=name, bytes=writer.end))

    @router.delete(
        "/admin/uploads/{upload_id}/files/{name:path}",
        response_model=UploadAnswer,
        responses=admin_refusals(RecordNotFoundError, WrongStateError, StorageFullError),
    )
    async def delete_file(upload_id: str, name: str) -> Response:
        """Forget one file of an upload, to send it anew."""
        return json_answer(_answer(await _ask(lambda: store.remove_file(upload_id, name))))

    @router.delete(
        "/admin/uploads/{upload_id}",
        response_model=DeletedAnswer,
        responses=admin_refusals(RecordNotFoundError, WrongStateError, StorageFullError),
    )
    async def delete_upload(upload_id: str) -> Response:
        """Remove an upload; what was registered of it stays."""
        await asyncio.to_thread(sources.remove, upload_id)
        return json_answer(DeletedAnswer(id=upload_id))


def _forget(remove: Callable[[], Any]) -> None:
    """Remove what is of no use; what cannot be removed now expires."""
    with contextlib.suppress(Exception):
        remove()
