"""manifest.json: what a bundle says about itself. Names and paths in it are validated before any is used."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.compression import CompressionSpec
from experts.errors import (
    BundleError,
    CorruptBundleError,
)
from experts.merging.methods import MergeMethod

FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
SHARED_NAME = "shared"
BASE_DELTA_NAME = "base_delta.safetensors"
EXPERT_FILES = ("expert.safetensors", "expert.json")
ROUTER_FILES = ("router.safetensors", "router.json")

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_RESERVED = frozenset({SHARED_NAME})


def check_name(name: str, what: str = "expert") -> str:
    """The name itself, if it is safe as a folder, a metric label and a model id.

    Raises:
        BundleError: it is not; names the pattern.
    """
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"{what} name {name!r} is not allowed; use 1 to 64 letters, digits, '.', '_' or '-', "
            "with a letter or digit at both ends"
        )
    if what == "expert" and name in _RESERVED:
        raise BundleError(f"expert name {name!r} is reserved for the shared expert; choose another")
    return name


def _valid_name(name: str) -> str:
    try:
        return check_name(name)
    except BundleError as error:
        raise ValueError(str(error)) from error


def _valid_path(path: str) -> str:
    """A normalised relative POSIX path below the bundle."""
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path != "/".join(parts)
        or path.startswith("/")
        or ".." in parts
        or "\\" in path
        or "\0" in path
    ):
        raise ValueError(f"file path {path!r} is not a plain relative path")
    return path


ExpertName = Annotated[str, AfterValidator(_valid_name)]
BundlePath = Annotated[str, AfterValidator(_valid_path)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Model):
    """One file: its content hash and size."""

    sha256: Digest
    nbytes: int = Field(ge=0)


class BaseInfo(_Model):
    """The base that the family was made from."""

    architecture: str
    fingerprint: str
    parameters: int
    nbytes: int


class TuningPoint(_Model):
    """One scale of the grid: mean loss per answer token on validation, in nats, lower is better."""

    scale: float
    loss: float
    by_expert: Mapping[str, float]


class TuningRecord(_Model):
    """How the merge's scale was chosen."""

    metric: Literal["twin_oracle_loss_per_answer_token"] = "twin_oracle_loss_per_answer_token"
    grid: tuple[TuningPoint, ...]


class MergeInfo(_Model):
    """The static merge that made the shared expert."""

    method: MergeMethod
    tuning: TuningRecord | None = None


class ExpertSource(_Model):
    """Where an expert came from: the kind of checkpoint and a sha256 over its files.

    Attributes:
        kind: lora: PEFT's; gguf: a LoRA in llama.cpp's form; full: a whole model; expert: exported as it was served.
    """

    kind: Literal["lora", "full", "gguf", "expert"]
    sha256: Digest


class ExpertSummary(_Model):
    """True sizes and errors of one expert; per tensor in its expert.json.

    Attributes:
        nbytes: stored bytes of all factors and exact vectors; quantised ones take more in memory, decoded.
        fraction_of_full: nbytes / bytes of the full model.
        relative_error: ‖v − v̂‖ / ‖v‖ over the whole exclusive vector (Frobenius); what is folded is lost.
        folded: tensors whose exclusive part was left out, by policy.
        norm: ‖v‖, Frobenius, of the whole exclusive vector; None where an older version did not write it.
    """

    tensors: int
    rank_min: int
    rank_mean: float
    rank_max: int
    nbytes: int
    fraction_of_full: float
    relative_error: float
    folded: int
    norm: float | None = Field(default=None, ge=0)


class ExpertEntry(_Model):
    """The current generation of one expert. A retired one keeps its entry: generations never repeat."""

    generation: int = Field(ge=1)
    state: Literal["active", "retired"]
    routed: bool
    source: ExpertSource
    compression: CompressionSpec
    summary: ExpertSummary


class RouterEntry(_Model):
    """The current router; generation 0 and no names when requests must name their experts."""

    generation: int = Field(ge=0)
    names: tuple[ExpertName, ...]


class Manifest(_Model):
    """The whole of manifest.json.

    Attributes:
        build_id: random, made anew by every build; tells a rebuilt bundle from an updated one.
        compression: what experts registered later are compressed with unless they say otherwise.
        files: every file of every generation still on disk → digest.
    """

    format_version: Literal[1] = FORMAT_VERSION
    name: str
    build_id: str
    base: BaseInfo
    merge: MergeInfo
    compression: CompressionSpec
    experts: Mapping[ExpertName, ExpertEntry]
    router: RouterEntry
    files: Mapping[BundlePath, FileEntry]

    @model_validator(mode="after")
    def _files_of_live_generations_are_listed(self) -> "Manifest":
        for path in self.live_files(shared=False):
            if path not in self.files:
                raise ValueError(f"file {path!r} is not listed")
        return self

    def active(self) -> tuple[str, ...]:
        """Names of active experts, sorted."""
        return tuple(sorted(name for name, entry in self.experts.items() if entry.state == "active"))

    def live_files(self, shared: bool = True) -> tuple[str, ...]:
        """Paths that opening the bundle depends on: shared, base delta, current experts, current router."""
        paths = [BASE_DELTA_NAME, f"{SHARED_NAME}/config.json", *self.expert_files()]
        if self.router.generation:
            paths += [f"{router_folder(self.router.generation)}/{file}" for file in ROUTER_FILES]
        if shared:
            paths += [path for path in self.files if path.startswith(f"{SHARED_NAME}/")]
        return tuple(dict.fromkeys(paths))

    def expert_files(self) -> tuple[str, ...]:
        """Paths of the current experts' files."""
        folders = [expert_folder(name, self.experts[name].generation) for name in self.active()]
        return tuple(f"{folder}/{file}" for folder in folders for file in EXPERT_FILES)


def expert_folder(name: str, generation: int) -> str:
    """Folder of one generation of one expert, relative to the bundle."""
    return f"experts/{name}/{generation}"


def router_folder(generation: int) -> str:
    """Folder of one generation of the router, relative to the bundle."""
    return f"router/{generation}"


def read_manifest(bundle: Path) -> Manifest:
    """Read and validate manifest.json.

    Raises:
        BundleError: there is no bundle, or its format version is another one.
        CorruptBundleError: the manifest is not readable as one.
    """
    path = bundle / MANIFEST_NAME
    if path.is_symlink():
        raise CorruptBundleError(f"{path} is a symbolic link; a bundle holds plain files only")
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{bundle} is not a bundle: it has no {MANIFEST_NAME}; build one with `twinserve build`"
        ) from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "document"
        if problem["loc"] == ("format_version",):
            raise BundleError(
                f"{path}: format version {problem['input']!r}; this program reads {FORMAT_VERSION}, "
                "so rebuild the bundle"
            ) from error
        raise CorruptBundleError(f"{path}: {where}: {problem['msg']}") from error
