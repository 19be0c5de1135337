"""Stream θ₀ + Δ into an ordinary Hugging Face folder, one tensor in memory at a time."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from experts.checkpoint.model import Checkpoint
from experts.checkpoint.storage import DTYPES
from experts.errors import CheckpointError, MismatchError
from experts.factors import Delta, dense

_COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
)  # fmt: skip
"""What makes the folder usable beside weights and config, and the terms it is under. Never code."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one tensor goes: which shard, at which offset of the file."""

    shard: str
    start: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file to be: its safetensors header and its length."""

    file_name: str
    header: bytes
    nbytes: int


def write_checkpoint(
    base: Checkpoint,
    deltas: Iterable[tuple[str, Delta | None]],
    target: Path,
    max_shard_bytes: int = 2 << 30,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a model with weights θ₀ + Δ, each tensor rounded once to the base's dtype.

    Tensors keep the names that the base's files use. Config, generation config, tokenizer and chat
    template come from the base. The folder is made if needed; it is not written atomically, so give a
    temporary one and rename it.

    Args:
        base: θ₀.
        deltas: (parameter, Δ) in any order; None, or a parameter that does not come, stays θ₀.
        target: the folder.
        max_shard_bytes: a tensor larger than that gets a shard of its own.
        progress: called with each parameter's name once it is written.

    Raises:
        MismatchError: a parameter that the base lacks or that comes twice, or a Δ of another shape.
        CheckpointError: a weight that the base's dtype cannot hold, or a target that is the base.
    """
    target.mkdir(parents=True, exist_ok=True)
    if target.samefile(base.path):
        raise CheckpointError(f"{target} is the base itself; write to another folder")
    places, shards = _plan(base, max_shard_bytes)
    waiting = dict.fromkeys(base.names)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for shard in shards:
            files[shard.file_name] = stack.enter_context((target / shard.file_name).open("wb"))
            files[shard.file_name].truncate(shard.nbytes)
            files[shard.file_name].write(shard.header)

        def place(name: str, value: Tensor) -> None:
            file = files[places[name].shard]
            file.seek(places[name].start)
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(name)

        for name, delta in deltas:
            if name not in waiting:
                raise MismatchError(f"{name} came twice, or the base {base.path} has no such parameter")
            del waiting[name]
            place(name, _changed(base, name, delta))
        for name in waiting:
            place(name, base.tensor(name))
        for written in files.values():
            written.flush()
            os.fsync(written.fileno())
    _write_index(base, places, shards, target)
    _copy_rest(base, target)


def _changed(base: Checkpoint, name: str, delta: Delta | None) -> Tensor:
    """θ₀ + Δ of one parameter in its stored dtype."""
    before = base.tensor(name)
    if delta is None:
        return before
    if tuple(delta.shape) != tuple(before.shape):
        raise MismatchError(f"{name} changes by {list(delta.shape)}, the base has {list(before.shape)}")
    exact = before.to(torch.float64 if before.dtype == torch.float64 else torch.float32)
    after = (exact + dense(delta).to(exact.dtype)).to(before.dtype)
    if not torch.isfinite(after).all():
        raise CheckpointError(f"{name} + its change is not finite in {before.dtype}; lower the merge's scale")
    return after


def _plan(base: Checkpoint, max_shard_bytes: int) -> tuple[dict[str, _Place], list[_Shard]]:
    """Share the parameters out over shards, in the base's order, and lay each shard out."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in base.names:
        nbytes = base.stored(name).nbytes
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    places: dict[str, _Place] = {}
    shards = []
    for number, group in enumerate(groups, start=1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        shard = f"model{part}.safetensors"
        header, starts, nbytes = _lay_out(base, group)
        shards.append(_Shard(shard, header, nbytes))
        places.update({name: _Place(shard, start) for name, start in starts.items()})
    return places, shards


def _lay_out(base: Checkpoint, names: Iterable[str]) -> tuple[bytes, dict[str, int], int]:
    """A shard's header, each tensor's offset in the file, and the file's length.

    Wider dtypes come first, which keeps every tensor aligned to its item size as readers expect.
    """
    ordered = sorted(names, key=lambda name: -base.dtype(name).itemsize)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    begins = {}
    for name in ordered:
        begins[name] = end
        end += base.stored(name).nbytes
        table[base.stored(name).name] = {
            "dtype": _DTYPE_NAMES[base.dtype(name)],
            "shape": list(base.shape(name)),
            "data_offsets": [begins[name], end],
        }
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    data_start = 8 + len(raw)
    header = len(raw).to_bytes(8, "little") + raw
    return header, {name: data_start + begin for name, begin in begins.items()}, data_start + end


def _write_index(base: Checkpoint, places: dict[str, _Place], shards: list[_Shard], target: Path) -> None:
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": base.nbytes},
        "weight_map": {base.stored(name).name: place.shard for name, place in sorted(places.items())},
    }
    _write_text(target / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _copy_rest(base: Checkpoint, target: Path) -> None:
    config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
    _write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    for name in _COPIED:
        if (base.path / name).is_file():
            _write_bytes(target / name, (base.path / name).read_bytes())
    templates = base.path / "additional_chat_templates"
    for template in sorted(templates.glob("*.jinja")):
        (target / templates.name).mkdir(exist_ok=True)
        _write_bytes(target / templates.name / template.name, template.read_bytes())


def _write_text(path: Path, text: str) -> None:
    _write_bytes(path, text.encode())


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
