"""One upload: what is known of it, and what is written of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from experts.bundle_manifest import FileEntry
from experts.errors import CheckpointError
from experts.registry.records import Files
from experts.registry.sources.names import check_file_name


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """What uploads may take.

    Attributes:
        nbytes: of the files of one upload together.
        uploads: that are begun and not registered.
        seconds: for which one may rest before it is removed.
    """

    nbytes: int
    uploads: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload.

    Attributes:
        files: name → bytes that are safe on the disk.
        registered: what the blob store holds of it, once it was registered; its own files are gone then.
        expires_in: seconds until it is removed if nothing happens.
    """

    id: str
    files: Mapping[str, int]
    registered: Files = field(default_factory=dict)
    expires_in: float = 0.0

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())


def read_files(told: Mapping[str, Any]) -> Files:
    """What `write_files` wrote.

    Raises:
        CheckpointError: it is not that.
    """
    try:
        return {check_file_name(name): FileEntry.model_validate(entry) for name, entry in told.items()}
    except ValidationError as error:
        raise CheckpointError("the job does not tell the digests of its upload; register it again") from error


def write_files(files: Files) -> dict[str, Any]:
    """Files as JSON."""
    return {name: entry.model_dump() for name, entry in files.items()}


class UploadState(BaseModel):
    """upload.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: Mapping[str, int] = {}
    registered: Mapping[str, FileEntry] = {}
