"""base_delta.safetensors: θ* − θ₀, streamed to disk and read back tensor by tensor.

A LoRA's exclusive vector is its own δ minus this, so a LoRA can join a bundle whose base is long gone.
Keys are ``<parameter>.up`` and ``.down`` where the difference is a low-rank product, else ``.dense``;
a parameter that the merge left alone has none. Values are bfloat16 where the shared expert is, since its own
rounding is the larger error there, else float32.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.checkpoint.storage import TensorStore
from experts.errors import CheckpointError, CorruptBundleError
from experts.factors import Delta, LowRank

_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_PARTS = ({"dense"}, {"up", "down"})


class BaseDeltaWriter:
    """Writes one parameter after another; memory for one tensor. The file appears when the block ends well.

    The safetensors header must come first but is known last, so tensors are spooled beside the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spool_path = path.with_name(f".{path.name}.spool")
        self._spool = self._spool_path.open("w+b")
        self._table: dict[str, object] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._spool.close()
            self._spool_path.unlink(missing_ok=True)

    def tee(
        self, deltas: Iterable[tuple[str, Delta | None]], base: Checkpoint
    ) -> Iterator[tuple[str, Delta | None]]:
        """Pass deltas through unchanged and write them on the way; `base` says the dtypes."""
        for name, delta in deltas:
            if delta is not None:
                self.add(name, delta, base.dtype(name))
            yield name, delta

    def add(self, name: str, delta: Delta, weight_dtype: torch.dtype) -> None:
        """Write one difference of a parameter that is stored as `weight_dtype`."""
        dtype = torch.bfloat16 if weight_dtype == torch.bfloat16 else torch.float32
        parts = {"up": delta.up, "down": delta.down} if isinstance(delta, LowRank) else {"dense": delta}
        for part, tensor in parts.items():
            begin = self._spool.tell()
            stored = tensor.to(dtype).contiguous()
            self._spool.write(stored.reshape(-1).view(torch.uint8).numpy().data)
            self._table[f"{name}.{part}"] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, self._spool.tell()],
            }

    def _finish(self) -> None:
        raw = json.dumps(self._table, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._spool.seek(0)
        with self._path.open("xb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            shutil.copyfileobj(self._spool, file, 1 << 20)


class BaseDelta:
    """θ* − θ₀ of every parameter that the merge changed."""

    def __init__(self, path: Path, store: TensorStore) -> None:
        self._path = path
        self._store = store
        self._parts: dict[str, set[str]] = {}
        for key in store.names:
            name, _, part = key.rpartition(".")
            self._parts.setdefault(name, set()).add(part)

    @classmethod
    def open(cls, path: Path) -> "BaseDelta":
        """Read the header.

        Raises:
            CorruptBundleError: it is not a sound safetensors file.
        """
        try:
            return cls(path, TensorStore([path]))
        except CheckpointError as error:
            raise CorruptBundleError(str(error)) from error

    def check(self, shared: Checkpoint) -> None:
        """Check every shape against the shared expert.

        Raises:
            CorruptBundleError: naming the tensor that does not fit.
        """
        for name, parts in self._parts.items():
            if parts not in _PARTS:
                raise CorruptBundleError(
                    f"{self._path}: {name}: has {sorted(parts)}, neither dense nor up and down"
                )
            if name not in shared:
                raise CorruptBundleError(f"{self._path}: {name}: the shared expert has no such parameter")
            if self._shape(name) != shared.shape(name):
                raise CorruptBundleError(
                    f"{self._path}: {name}: makes {self._shape(name)}, "
                    f"the shared expert has {shared.shape(name)}"
                )

    def delta(self, name: str) -> Delta | None:
        """θ* − θ₀ of one parameter in float32; None where the merge left it alone."""
        parts = self._parts.get(name)
        if parts is None:
            return None
        if "dense" in parts:
            return self._tensor(f"{name}.dense")
        return LowRank(self._tensor(f"{name}.up"), self._tensor(f"{name}.down"))

    def _tensor(self, key: str) -> Tensor:
        return self._store.tensor(key).to(torch.float32)

    def _shape(self, name: str) -> tuple[int, ...]:
        if "dense" in self._parts[name]:
            return self._store.stored(f"{name}.dense").shape
        up, down = (self._store.stored(f"{name}.{part}").shape for part in ("up", "down"))
        if len(up) != 2 or len(down) != 2 or up[1] != down[0]:
            return ()
        return up[0], down[1]
