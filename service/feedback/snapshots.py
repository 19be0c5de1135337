"""Versions of the bandit: the last few, in memory and, where there is a folder, on disk.

A version is one file, `feedback-VERSION.safetensors`, written under another name and renamed: a reader sees all of
it or nothing. Its header holds what is not a tensor, as JSON.
"""

import contextlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experts.routing import Arm, Bandit, BanditSpec, ContextMap

_log = logging.getLogger(__name__)

_NAME = re.compile(r"feedback-(\d{12})\.safetensors")
_FORMAT = "1"


class Snapshots:
    """The last `keep` versions.

    Args:
        folder: where they are kept over a restart; None keeps them in memory alone.
        keep: older ones are removed, files too.
    """

    def __init__(self, folder: Path | None, keep: int = 16) -> None:
        self._folder = folder
        self._keep = keep
        self._kept: dict[int, Bandit] = {}
        self._files: dict[int, Path] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                match = _NAME.fullmatch(path.name)
                if match:
                    self._files[int(match[1])] = path

    @property
    def versions(self) -> tuple[int, ...]:
        """That can be gone back to, oldest first."""
        return tuple(sorted({*self._kept, *self._files}))

    def newest(self, spec: BanditSpec) -> tuple[Bandit, ContextMap] | None:
        """The newest readable file's version and what it reads; None where there is none."""
        for version in sorted(self._files, reverse=True):
            found = self._read(version, spec)
            if found is not None:
                return found
        return None

    def get(self, version: int, spec: BanditSpec) -> Bandit | None:
        """A kept version; None where there is none, or its file cannot be read."""
        if version in self._kept:
            return self._kept[version]
        found = self._read(version, spec)
        return None if found is None else found[0]

    def keep(self, bandit: Bandit, context: ContextMap) -> None:
        """Keep this version; may write a file, so it is not for the event loop."""
        self._kept[bandit.version] = bandit
        if self._folder is not None:
            path = self._folder / f"feedback-{bandit.version:012d}.safetensors"
            partial = path.with_suffix(".partial")
            save_file(_tensors(bandit, context), partial, metadata=_header(bandit))
            os.replace(partial, path)
            self._files[bandit.version] = path
        for version in self.versions[: -self._keep]:
            self._kept.pop(version, None)
            old = self._files.pop(version, None)
            if old is not None:
                with contextlib.suppress(FileNotFoundError):
                    old.unlink()

    def _read(self, version: int, spec: BanditSpec) -> tuple[Bandit, ContextMap] | None:
        path = self._files.get(version)
        if path is None:
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
                header = file.metadata() or {}
            return _decoded(header, tensors, spec)
        except (OSError, SafetensorError, ValidationError, KeyError, ValueError) as error:
            _log.error("%s is not a readable version of the feedback (%s); it is left out", path, error)
            return None


def _tensors(bandit: Bandit, context: ContextMap) -> dict[str, Any]:
    tensors: dict[str, Any] = {
        "context.mean": context.mean,
        "context.std": context.std,
        "context.projection": context.projection,
    }
    for index, arm in enumerate(bandit.arms.values()):
        tensors[f"arms.{index}.gram"] = arm.gram
        tensors[f"arms.{index}.moment"] = arm.moment
    return tensors


def _header(bandit: Bandit) -> dict[str, str]:
    arms = [
        {"name": name, "updates": arm.updates, "credit": arm.credit, "reward": arm.reward}
        for name, arm in bandit.arms.items()
    ]
    return {
        "format": _FORMAT,
        "version": str(bandit.version),
        "updates": str(bandit.updates),
        "spec": bandit.spec.model_dump_json(),
        "arms": json.dumps(arms),
    }


def _decoded(header: dict[str, str], tensors: dict[str, Any], spec: BanditSpec) -> tuple[Bandit, ContextMap]:
    """Under the present hyper-parameters, which may differ in all but the shapes.

    Raises:
        ValueError, KeyError, ValidationError: it is not what `keep` wrote, or of other dimensions.
    """
    if header.get("format") != _FORMAT:
        raise ValueError(f"format {header.get('format')!r}, expected {_FORMAT!r}")
    written = BanditSpec.model_validate_json(header["spec"])
    if (written.dims, written.seed) != (spec.dims, spec.seed):
        raise ValueError(f"dims and seed are {written.dims}, {written.seed}; now {spec.dims}, {spec.seed}")
    if not all(bool(np.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError("NaN or Inf")
    context = ContextMap(tensors["context.mean"], tensors["context.std"], tensors["context.projection"])
    arms = {
        one["name"]: Arm.solved(
            tensors[f"arms.{index}.gram"],
            tensors[f"arms.{index}.moment"],
            spec.ridge,
            int(one["updates"]),
            float(one["credit"]),
            float(one["reward"]),
        )
        for index, one in enumerate(json.loads(header["arms"]))
    }
    return Bandit(spec, int(header["version"]), int(header["updates"]), arms), context
