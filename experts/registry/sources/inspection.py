"""Whether the files of a fine-tune are what they claim to be, from headers and configs alone: nothing is mapped."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experts.checkpoint.model import refuse_remote_code
from experts.checkpoint.storage import StoredTensor, read_header, read_json
from experts.errors import CheckpointError
from experts.registry.sources.names import CONFIGS, is_accepted

MAX_HEADER_BYTES = 32 * 2**20
"""Of one safetensors file; a tenth of it holds what the largest models need. Parsed, it takes several times that."""

_MAX_TENSORS = 200_000
_MAX_TENSOR_NAME = 512
_MAX_DIMENSIONS = 8
_MAX_EXTENT = 2**31
_MAX_FILES = 2_000

_REMOTE_CODE = frozenset({"auto_map", "custom_pipelines", "trust_remote_code", "custom_code"})
_TEMPLATES = frozenset({"chat_template", "default_chat_template"})
_MAX_DEPTH = 64


def inspect_source(folder: Path, *, foreign: bool) -> tuple[Path, ...]:
    """Check every file of a source before any tensor of it is touched.

    Args:
        folder: holds the files.
        foreign: it was uploaded or fetched, so it may hold nothing but accepted files. A folder of this machine
            may hold more, which is not looked at: a model's own tokenizer and template, an optimiser's state.

    Returns:
        The safetensors files.

    Raises:
        CheckpointError: a header out of bounds, overlapping or truncated data, code in a config, a template;
            names the file.
    """
    entries = sorted(folder.iterdir())
    if len(entries) > _MAX_FILES:
        raise CheckpointError(f"{folder.name} holds more than {_MAX_FILES} files")
    if foreign:
        for entry in entries:
            if entry.is_symlink() or not entry.is_file() or not is_accepted(entry.name):
                raise CheckpointError(f"{entry.name!r} is not a file that an expert is made of; leave it out")
    refuse_remote_code(folder)
    for name in (*CONFIGS, "generation_config.json"):
        if (folder / name).is_file():
            _check_config(name, read_json(folder / name))
    weights = tuple(
        entry
        for entry in entries
        if entry.name.endswith(".safetensors") and entry.is_file() and (foreign or is_accepted(entry.name))
    )
    inspect_weights(weights)
    return weights


def inspect_weights(files: Iterable[Path]) -> None:
    """Check the headers of safetensors files: length, offsets, gaps, sizes, dtypes, counts, names.

    Raises:
        CheckpointError: names the file and tensor.
    """
    for file in files:
        header = read_header(file, MAX_HEADER_BYTES)
        if len(header) > _MAX_TENSORS:
            raise CheckpointError(f"{file.name} holds {len(header)} tensors, more than {_MAX_TENSORS}")
        for tensor in header.values():
            problem = _problem(tensor)
            if problem:
                raise CheckpointError(f"{file.name}: {tensor.name[:_MAX_TENSOR_NAME]!a} {problem}")


def _problem(tensor: StoredTensor) -> str | None:
    if len(tensor.name) > _MAX_TENSOR_NAME:
        return f"goes on: its name has {len(tensor.name)} characters, more than {_MAX_TENSOR_NAME}"
    if not tensor.name.isascii() or not tensor.name.isprintable() or "/" in tensor.name or not tensor.name:
        return "is not the name of a parameter"
    if len(tensor.shape) > _MAX_DIMENSIONS:
        return f"has {len(tensor.shape)} dimensions, more than {_MAX_DIMENSIONS}"
    if any(not 0 < extent <= _MAX_EXTENT for extent in tensor.shape):
        return f"has the shape {list(tensor.shape)[:_MAX_DIMENSIONS]}, which no weight has"
    return None


def _check_config(name: str, config: Any) -> None:
    """Refuse, at any depth, fields that bring code or a template along."""
    level: list[Any] = [config]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                found = next((key for key in value if key in _REMOTE_CODE | _TEMPLATES and value[key]), None)
                if found is not None:
                    what = (
                        "asks for code that comes with it" if found in _REMOTE_CODE else "brings a template"
                    )
                    raise CheckpointError(
                        f"{name} has the field {found!r}, which {what}, and is refused; remove the field"
                    )
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
        if not level:
            return
    raise CheckpointError(f"{name} nests deeper than {_MAX_DEPTH} levels")
