"""manifest.json of a classifier bundle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.bundle_manifest import (
    EXPERT_FILES,
    MANIFEST_NAME,
    ROUTER_FILES,
    SHARED_NAME,
    BaseInfo,
    BundlePath,
    ExpertName,
    ExpertSource,
    ExpertSummary,
    FileEntry,
    MergeInfo,
    RouterEntry,
)
from experts.compression import CompressionSpec
from experts.errors import BundleError, CorruptBundleError

FORMAT: Literal["twinserve-classifier"] = "twinserve-classifier"
FORMAT_VERSION: Literal[1] = 1
HEAD_FILE = "head.safetensors"
ROUTER_FOLDER = "router"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassifierEntry(_Model):
    """One expert.

    Attributes:
        labels: its label set, in the order of its head's rows.
        summary: of its exclusive vector; the head comes on top.
    """

    labels: tuple[str, ...] = Field(min_length=2)
    head_nbytes: int = Field(ge=1)
    source: ExpertSource
    summary: ExpertSummary

    @property
    def nbytes(self) -> int:
        """All that is stored of the expert."""
        return self.summary.nbytes + self.head_nbytes


class ClassifierManifest(_Model):
    """The whole of manifest.json.

    Attributes:
        max_tokens: tokens of a text that the router was fitted on at most; longer texts work too.
        files: every file → digest.
    """

    format: Literal["twinserve-classifier"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    name: str
    build_id: str
    base: BaseInfo
    merge: MergeInfo
    compression: CompressionSpec
    max_tokens: int = Field(ge=1)
    experts: Mapping[ExpertName, ClassifierEntry] = Field(min_length=1)
    router: RouterEntry
    files: Mapping[BundlePath, FileEntry]

    @model_validator(mode="after")
    def _live_files_are_listed(self) -> "ClassifierManifest":
        for path in self.live_files():
            if path not in self.files:
                raise ValueError(f"file {path!r} is not listed")
        return self

    def live_files(self) -> tuple[str, ...]:
        """Paths that opening the bundle depends on."""
        paths = [
            f"{SHARED_NAME}/config.json",
            *(path for path in self.files if path.startswith(f"{SHARED_NAME}/")),
        ]
        for name in self.experts:
            paths += [f"{expert_folder(name)}/{file}" for file in (*EXPERT_FILES, HEAD_FILE)]
        if self.router.generation:
            paths += [f"{ROUTER_FOLDER}/{file}" for file in ROUTER_FILES]
        return tuple(dict.fromkeys(paths))


def expert_folder(name: str) -> str:
    """Folder of one expert, relative to the bundle."""
    return f"experts/{name}"


def read_manifest(bundle: Path) -> ClassifierManifest:
    """Read and validate manifest.json.

    Raises:
        BundleError: there is no classifier bundle, or its format version is another one.
        CorruptBundleError: the manifest is not readable as one.
    """
    path = bundle / MANIFEST_NAME
    if path.is_symlink():
        raise CorruptBundleError(f"{path} is a symbolic link; a bundle holds plain files only")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{bundle} is not a classifier bundle: {MANIFEST_NAME} cannot be read ({error}); build one with "
            "`twinserve classifier build`"
        ) from error
    try:
        return ClassifierManifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        if any(part["loc"] == ("format_version",) for part in error.errors()):
            raise BundleError(f"{path}: another format version; rebuild the bundle") from error
        if f'"{FORMAT}"'.encode() not in content:
            raise BundleError(
                f"{bundle} is not a classifier bundle but one of a language model; serve it as the bundle, and "
                "build a classifier with `twinserve classifier build`"
            ) from error
        where = ".".join(str(part) for part in problem["loc"]) or "document"
        raise CorruptBundleError(f"{path}: {where}: {problem['msg']}") from error
