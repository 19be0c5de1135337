"""Files that lie about themselves are found out from their headers, before anything is mapped."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from experts.errors import CheckpointError
from experts.registry.sources import inspect_source, inspect_weights
from experts.registry.sources.inspection import MAX_HEADER_BYTES
from tests.fixtures.bombs import BOMBS


@pytest.mark.parametrize("kind", BOMBS)
def test_a_safetensors_bomb_is_refused_by_its_header(tmp_path: Path, kind: str) -> None:
    content, why = BOMBS[kind]
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        inspect_weights([file])


def test_a_header_that_is_large_and_real_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        sparse.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="declares a header"):
        inspect_weights([file])


def lora(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def test_a_sound_source_passes_and_tells_its_weights(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora")
    assert inspect_source(folder, foreign=True) == (folder / "adapter_model.safetensors",)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"nested": [{"auto_map": {"x": "y"}}]}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"custom_pipelines": {"x": {"impl": "evil.Pipe"}}}, "custom_pipelines"),
        ({"chat_template": "{{ evil }}"}, "chat_template"),
        ({"text_config": {"chat_template": "{{ evil }}"}}, "chat_template"),
    ],
)
def test_code_and_templates_in_a_config_are_refused(tmp_path: Path, config: dict[str, Any], why: str) -> None:
    folder = lora(tmp_path / "lora", **config)
    with pytest.raises(CheckpointError, match=why):
        inspect_source(folder, foreign=True)


def test_a_config_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora")
    for depth in (100, 100_000):
        (folder / "adapter_config.json").write_text('{"a":' * depth + "1" + "}" * depth)
        with pytest.raises(CheckpointError, match=r"nests deeper|not valid JSON"):
            inspect_source(folder, foreign=True)


def test_a_foreign_source_may_hold_nothing_else_and_a_local_one_may(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "pytorch_model.bin", "evil.py"):
        folder = lora(tmp_path / name.replace(".", "-"))
        (folder / name).write_text("{}")
        assert len(inspect_source(folder, foreign=False)) == 1
        with pytest.raises(CheckpointError, match=name):
            inspect_source(folder, foreign=True)
    folder = lora(tmp_path / "linked")
    (folder / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_source(folder, foreign=True)
