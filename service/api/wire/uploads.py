"""`/admin/uploads`."""

from typing import Any, Literal

from pydantic import ConfigDict

from service.api.wire.answers import Answer

_UPLOAD: dict[str, Any] = {
    "id": "upload-3b9f0c6d2e7a41588f1c2d3e",
    "object": "upload",
    "state": "open",
    "files": [
        {"name": "adapter_config.json", "bytes": 412},
        {"name": "adapter_model.safetensors", "bytes": 0},
    ],
    "bytes": 412,
    "expires_in_seconds": 86400.0,
}


class UploadedFile(Answer):
    """One file.

    Attributes:
        bytes: that are safe on the disk; where to go on.
    """

    name: str
    bytes: int


class UploadAnswer(Answer):
    """One upload.

    Attributes:
        state: registered: its files are the registry's; it can be registered again, and takes no more.
        expires_in_seconds: until it is removed, if it rests.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_UPLOAD]})

    id: str
    object: Literal["upload"] = "upload"
    state: Literal["open", "registered"]
    files: list[UploadedFile]
    bytes: int
    expires_in_seconds: float


class UploadList(Answer):
    """Every upload of this server."""

    object: Literal["list"] = "list"
    data: list[UploadAnswer]
