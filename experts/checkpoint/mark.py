"""The mark on a file that holds a change of a bundle's shared expert, not of the base it was made from.

Such a file fits that shared expert alone: the same B·A over the base would be another model. The mark is one line,
kept where tools that know nothing of it leave it in place: `base_model_name_or_path` of a PEFT adapter, a key of a
GGUF file, the metadata of a safetensors file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint.gguf_file import find_gguf, read_gguf
from experts.checkpoint.storage import read_json, read_metadata
from experts.errors import CheckpointError

MARK_KEY = "twinserve.shared"
"""In the metadata of safetensors and GGUF files: the mark."""
VALUES_KEY = "twinserve.values"
"""Beside it: parameter → singular values, as JSON, which B·A alone does not tell."""
DTYPE_KEY = "twinserve.dtype"
"""Beside it: the dtype of the singular vectors before B took the values in, as PyTorch names it."""

_SCHEME = "twinserve:"
_MARK = re.compile(rf"{_SCHEME}(?P<bundle>[A-Za-z0-9._-]{{1,64}})@(?P<digest>[0-9a-f]{{64}})")
EXPERT_FILE = "expert.safetensors"


@dataclass(frozen=True, slots=True)
class SharedMark:
    """Which shared expert a change belongs to.

    Attributes:
        bundle: the bundle's name, for people.
        digest: sha256 over the shared expert's weights and config, see `shared_digest`.
    """

    bundle: str
    digest: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.bundle}@{self.digest}"

    @classmethod
    def parse(cls, text: Any) -> "SharedMark | None":
        """The mark that a text is; None if it is anything else."""
        match = _MARK.fullmatch(text) if isinstance(text, str) else None
        return cls(match["bundle"], match["digest"]) if match else None


@dataclass(frozen=True, slots=True)
class Exactly:
    """What makes B·A the very factors that were exported.

    Attributes:
        values: parameter → its singular values.
        dtype: of the singular vectors, as PyTorch names it without its module.
    """

    values: Mapping[str, tuple[float, ...]]
    dtype: str

    def texts(self) -> dict[str, str]:
        """As metadata."""
        return {
            VALUES_KEY: json.dumps({name: list(found) for name, found in self.values.items()}),
            DTYPE_KEY: self.dtype,
        }

    @classmethod
    def parse(cls, texts: Mapping[str, Any]) -> "Exactly | None":
        """What metadata tells; None where it tells nothing that makes sense, which costs exactness alone."""
        try:
            told = json.loads(texts[VALUES_KEY])
            values = {str(name): tuple(float(value) for value in found) for name, found in told.items()}
            return cls(values, str(texts[DTYPE_KEY]))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            return None


def shared_digest(files: Mapping[str, str]) -> str:
    """One sha256 over the shared folder's weights and config.

    Args:
        files: file name within the shared folder → sha256, as a bundle's manifest lists them.
    """
    told = sorted(
        (name, sha256)
        for name, sha256 in files.items()
        if name == "config.json" or name.endswith(".safetensors")
    )
    return hashlib.sha256("".join(f"{name}\0{sha256}\n" for name, sha256 in told).encode()).hexdigest()


def read_mark(folder: Path) -> tuple[SharedMark, Exactly | None] | None:
    """The mark of an adapter, a GGUF file or a ready expert in `folder`; None for a change of the base.

    Raises:
        CheckpointError: the file that would hold it cannot be read.
    """
    adapter, ready = folder / "adapter_config.json", folder / EXPERT_FILE
    if adapter.is_file():
        mark = SharedMark.parse(read_json(adapter).get("base_model_name_or_path"))
        weights = folder / "adapter_model.safetensors"
        told: Mapping[str, Any] = read_metadata(weights) if mark and weights.is_file() else {}
    elif ready.is_file():
        told = read_metadata(ready)
        mark = SharedMark.parse(told.get(MARK_KEY))
    elif (path := find_gguf(folder)) is not None:
        told = read_gguf(path).fields
        mark = SharedMark.parse(told.get(MARK_KEY))
    else:
        return None
    return (mark, Exactly.parse(told)) if mark else None


def refuse_mark(folder: Path) -> None:
    """Raise if what `folder` holds is a change of a shared expert.

    Raises:
        CheckpointError: it is; names the bundle.
    """
    found = read_mark(folder)
    if found is not None:
        raise CheckpointError(
            f"{folder} is a change of the shared expert of bundle {found[0].bundle!r}, not of its base; register it "
            "with a server of that bundle, or export it as a merged model first"
        )
