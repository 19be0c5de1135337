"""A GGUF file read with every count and offset checked before it is used; it may come from anyone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only what an adapter needs: scalars, strings and
short arrays as metadata, tensors in 16 or 32 bits. The `gguf` package's reader trusts the counts that a file tells.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from experts.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_FIELDS = 4096
_MAX_TENSORS = 65_536
_MAX_STRING = 32 << 20
_MAX_ARRAY = 65_536
_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        shape: as PyTorch counts: rows first, GGUF's own order reversed.
        start: offset of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened file.

    Attributes:
        fields: metadata by key; arrays as tuples.
        tensors: by name, in file order.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def tensor(self, name: str) -> Tensor:
        """A copy of the tensor as stored. KeyError if there is no such tensor.

        Raises:
            CheckpointError: the file became shorter.
        """
        place = self.tensors[name]
        try:
            with self.path.open("rb") as file:
                file.seek(place.start)
                content = bytearray(file.read(place.nbytes))
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        if len(content) != place.nbytes:
            raise CheckpointError(f"{self.path} ended within {name}; was it overwritten?")
        return torch.frombuffer(content, dtype=place.dtype).reshape(place.shape)


def find_gguf(folder: Path) -> Path | None:
    """The one GGUF file of a folder; None if it has none.

    Raises:
        CheckpointError: there are several.
    """
    found = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds {len(found)} GGUF files; give a folder with one adapter")
    return found[0] if found else None


def read_gguf(path: Path) -> GgufFile:
    """The verified table of contents of a GGUF file.

    Raises:
        CheckpointError: it is missing, truncated or inconsistent, or holds what no adapter needs; names the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(path, file, size).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; is the folder complete?") from error
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a sound GGUF file ({error}); convert the adapter again"
        ) from error


class _Reader:
    """One pass over the head of a file. ValueError, struct.error: it is not sound."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size

    def read(self) -> GgufFile:
        if self._file.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; {_VERSIONS} are known")
        tensors = self._count("Q", _MAX_TENSORS, "tensors")
        fields = dict(self._field() for _ in range(self._count("Q", _MAX_FIELDS, "metadata fields")))
        described = [self._described() for _ in range(tensors)]
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r}")
        begin = self._file.tell()
        begin += -begin % alignment
        placed = {name: self._placed(name, kind, shape, begin + at) for name, kind, shape, at in described}
        if len(placed) != len(described):
            raise ValueError("a tensor comes twice")
        end = 0
        for tensor in sorted(placed.values(), key=lambda tensor: tensor.start):
            if tensor.start < end:
                raise ValueError(f"{tensor.name} overlaps the tensor before it")
            end = tensor.start + tensor.nbytes
        return GgufFile(self._path, fields, placed)

    def _placed(self, name: str, kind: int, shape: tuple[int, ...], start: int) -> GgufTensor:
        if kind not in _DTYPES:
            raise CheckpointError(
                f"{self._path}: {name} is quantised (GGML type {kind}); adapters are read in F32, F16 and BF16, so "
                "convert it again with --outtype f32"
            )
        nbytes = _DTYPES[kind].itemsize
        for extent in shape:
            nbytes *= extent
        if start + nbytes > self._size:
            raise ValueError(f"{name} reaches beyond the file's {self._size} bytes")
        return GgufTensor(name, _DTYPES[kind], shape, start, nbytes)

    def _described(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        extents = [self._number("Q") for _ in range(self._count("I", 4, f"dimensions of {name}"))]
        if any(extent < 1 for extent in extents):
            raise ValueError(f"{name} has the shape {extents}")
        kind, offset = self._number("I"), self._number("Q")
        return name, int(kind), tuple(int(extent) for extent in reversed(extents)), int(offset)

    def _field(self) -> tuple[str, Any]:
        key = self._string()
        return key, self._value(int(self._number("I")))

    def _value(self, kind: int, nested: bool = False) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and not nested:
            of = int(self._number("I"))
            return tuple(
                self._value(of, nested=True) for _ in range(self._count("Q", _MAX_ARRAY, "array items"))
            )
        if kind not in _SCALARS:
            raise ValueError(f"a metadata field of type {kind}")
        value = self._number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _string(self) -> str:
        length = self._count("Q", _MAX_STRING, "bytes of a string")
        raw = self._file.read(length)
        if len(raw) != length:
            raise ValueError("it ends within a string")
        return raw.decode("utf-8")

    def _count(self, form: str, most: int, what: str) -> int:
        count = int(self._number(form))
        if count > most:
            raise ValueError(f"it declares {count} {what}, {most} are read")
        return count

    def _number(self, form: str) -> Any:
        size = struct.calcsize(f"<{form}")
        return struct.unpack(f"<{form}", self._file.read(size))[0]
