"""An expert's own files, marked with the shared expert that they fit."""

import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from experts.bundle_manifest import EXPERT_FILES
from experts.checkpoint.mark import MARK_KEY, SharedMark


def write_ready(expert: Path, mark: SharedMark, folder: Path) -> None:
    """Copy expert.safetensors, with the mark in its metadata, and expert.json into an existing empty folder.

    Args:
        expert: folder of one generation's files.
        mark: of the shared expert that they were computed against.
        folder: where to.
    """
    weights, report = EXPERT_FILES
    with safe_open(expert / weights, framework="pt") as file:
        metadata = {**(file.metadata() or {}), MARK_KEY: str(mark)}
        save_file({name: file.get_tensor(name) for name in file.keys()}, folder / weights, metadata=metadata)  # noqa: SIM118
    shutil.copyfile(expert / report, folder / report)
    os.chmod(folder / report, 0o644)
