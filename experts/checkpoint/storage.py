"""safetensors files, checked before use and read lazily through mmap.

The header is parsed and verified here, so that a truncated, oversized or inconsistent file is a clear
`CheckpointError` that names it, before any tensor is touched.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON, data).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from experts.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Configs and shard indices are far smaller; tokenizers of 250k tokens come near a third of it."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' dtype names; others (8-bit floats and smaller) are refused."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        start: offset of its first byte in the file.
        nbytes: number of its bytes.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: missing, oversized, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {size} bytes, more than the limit of {MAX_JSON_BYTES} for JSON"
            )
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; is the folder complete?") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key appears twice")
    return content


def read_header(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, StoredTensor]:
    """The verified table of contents of one safetensors file.

    Args:
        path: the file.
        max_bytes: of the header; where the file comes from elsewhere, less than the format allows.

    Raises:
        CheckpointError: missing, truncated, oversized or inconsistent; names the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) == 8 and length > max_bytes:
                raise CheckpointError(
                    f"{path} declares a header of {length} bytes, the limit is {max_bytes}; "
                    "it is not a sound safetensors file"
                )
            if len(prefix) < 8 or 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated: its header does not fit its {size} bytes; fetch it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; is the folder complete?") from error
    try:
        table = json.loads(raw, object_pairs_hook=_no_duplicates)
        if not isinstance(table, dict):
            raise TypeError("not an object")
        table.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in table.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a corrupt safetensors header ({error}); save the model again as safetensors"
        ) from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path} has a corrupt safetensors header: {tensor.name} does not begin where the tensor "
                "before it ends; save the model again"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} is truncated or has surplus bytes: its header describes {end} bytes, "
            f"the file has {size}; fetch it again"
        )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The free texts in the header of one safetensors file, which is verified as by `read_header`.

    Raises:
        CheckpointError: as `read_header`, or what is there is not text by name.
    """
    read_header(path)
    with path.open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path} has metadata that is not text by name; save it again")
    return metadata


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One entry of a header; ValueError, TypeError or KeyError if it is inconsistent."""
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or offsets that are not counts")
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} is stored as {entry['dtype']}; only plain floating-point weights can be used, "
            "dequantise the model first"
        )
    dtype = DTYPES[entry["dtype"]]
    nbytes = dtype.itemsize
    for extent in shape:
        nbytes *= extent
    if end - begin != nbytes:
        raise ValueError(f"{name} has {end - begin} bytes, its shape and dtype need {nbytes}")
    return StoredTensor(path, name, dtype, shape, data_start + begin, nbytes)


class TensorStore:
    """All tensors of one or several safetensors files, read on demand.

    Tensors are views of memory-mapped files: nothing is read until it is used, and nobody may write to
    them. Replacing a file by renaming another over it is safe, overwriting it in place is not.
    """

    def __init__(self, files: Iterable[Path], *, mapped: bool = True) -> None:
        """Verify the headers of `files`.

        Args:
            files: safetensors files.
            mapped: False reads each tensor into memory of its own, anew whenever it is asked for: who goes through
                all of them once needs memory for those at hand, where mapped pages would stay with the process.

        Raises:
            CheckpointError: a file is corrupt, or a tensor appears in two of them.
        """
        self.files = tuple(files)
        self._mapped = mapped
        self._tensors: dict[str, StoredTensor] = {}
        self._handles: dict[Path, Any] = {}
        for file in self.files:
            for name, tensor in read_header(file).items():
                if name in self._tensors:
                    raise CheckpointError(f"{name} is stored twice, in {self._tensors[name].file} and {file}")
                self._tensors[name] = tensor

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, in file order."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def stored(self, name: str) -> StoredTensor:
        """Where `name` lies. KeyError if there is no such tensor."""
        return self._tensors[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored. KeyError if there is no such tensor."""
        if not self._mapped:
            return _read(self._tensors[name])
        file = self._tensors[name].file
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
        return tensor


def _read(stored: StoredTensor) -> Tensor:
    """One tensor in memory of its own."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    left = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            while left:
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{stored.file} ended within {stored.name}; was it overwritten?")
                left = left[count:]
    except OSError as error:
        raise CheckpointError(f"{stored.file}: {stored.name} cannot be read: {error}") from error
    return tensor


def find_weights(folder: Path, stem: str) -> tuple[Path, ...]:
    """The safetensors files of a model (`stem` "model") or an adapter ("adapter_model") in `folder`.

    Raises:
        CheckpointError: none there, only pickled weights, or an index that is broken or points elsewhere.
    """
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return (single,)
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return _sharded(folder, index)
    pickled = sorted(
        name
        for name in (os.listdir(folder) if folder.is_dir() else ())
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) and name != "training_args.bin"
    )
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]} is a pickle, which can run code when it is loaded, and is refused; "
            f"convert it with save_pretrained(..., safe_serialization=True) to get {single.name}"
        )
    raise CheckpointError(f"{folder} has no {single.name}; give a folder saved with save_pretrained")


def _sharded(folder: Path, index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; save the model again")
    files: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} maps {name} to {shard!r}; a shard is a .safetensors file in the same folder"
            )
        files[shard] = folder / shard
    shards = tuple(files[shard] for shard in sorted(files))
    contents = {path.name: read_header(path) for path in shards}
    for name, shard in weight_map.items():
        if name not in contents[shard]:
            raise CheckpointError(f"{index} maps {name} to {shard}, which lacks it; fetch the shards again")
    return shards
