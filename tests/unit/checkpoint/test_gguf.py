"""LoRA adapters in llama.cpp's form: read as fine-tunes of a base, and never trusted."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from experts.checkpoint import Checkpoint, open_fine_tune
from experts.checkpoint.gguf_file import read_gguf
from experts.checkpoint.gguf_lora import GgufLora
from experts.errors import CheckpointError, MismatchError
from experts.factors import LowRank
from tests.fixtures.tiny import tiny_model

HIDDEN, HEADS, KEY_HEADS, HALF = 64, 4, 2, 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny_model("llama", tmp_path_factory.mktemp("base")))


def _adapter(folder: Path, tensors: dict[str, np.ndarray], alpha: float = 6.0, **fields: str) -> Path:
    """An adapter as llama.cpp's converter writes it; a field that is "" is left out."""
    folder.mkdir()
    told = {"general.type": "adapter", "adapter.type": "lora", **fields}
    writer = gguf.GGUFWriter(folder / "a.gguf", told.pop("architecture", "llama"))
    for key, value in told.items():
        if value:
            writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def _pair(stem: str, rows: int, columns: int = HIDDEN, rank: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(rows)
    return {
        f"{stem}.lora_a": draw.standard_normal((rank, columns)).astype(np.float32),
        f"{stem}.lora_b": draw.standard_normal((rows, rank)).astype(np.float32),
    }


def test_names_scaling_and_the_order_of_rotated_rows_are_turned_back(
    tmp_path: Path, base: Checkpoint
) -> None:
    stems = {
        "attn_q": ("self_attn.q_proj", HEADS),
        "attn_k": ("self_attn.k_proj", KEY_HEADS),
        "attn_v": ("self_attn.v_proj", 0),
    }
    rows = {"attn_q": HIDDEN, "attn_k": HIDDEN // 2, "attn_v": HIDDEN // 2}
    tensors: dict[str, np.ndarray] = {}
    for stem in stems:
        tensors |= _pair(f"blk.1.{stem}.weight", rows[stem])
    tuned = open_fine_tune("a", _adapter(tmp_path / "a", tensors), base)
    assert tuned.touched() == {f"model.layers.1.{module}.weight" for module, _ in stems.values()}
    for stem, (module, heads) in stems.items():
        product = 2.0 * tensors[f"blk.1.{stem}.weight.lora_b"] @ tensors[f"blk.1.{stem}.weight.lora_a"]
        expected = product.copy()
        for head in range(heads):  # llama.cpp's row 2i + j of a head is transformers' row j·8 + i
            for i in range(HALF):
                for j in range(2):
                    expected[16 * head + HALF * j + i] = product[16 * head + 2 * i + j]
        delta = tuned.delta(f"model.layers.1.{module}.weight")
        assert isinstance(delta, LowRank)
        torch.testing.assert_close(delta.dense(), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert tuned.delta("model.layers.0.self_attn.q_proj.weight") is None


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_no_alpha_is_a_scaling_of_one(alpha: float, tmp_path: Path, base: Checkpoint) -> None:
    tensors = _pair("blk.0.attn_v.weight", 32)
    delta = GgufLora("a", _adapter(tmp_path / "a", tensors, alpha), base).delta(
        "model.layers.0.self_attn.v_proj.weight"
    )
    assert delta is not None
    product = tensors["blk.0.attn_v.weight.lora_b"] @ tensors["blk.0.attn_v.weight.lora_a"]
    torch.testing.assert_close(delta.dense(), torch.tensor(product), atol=1e-5, rtol=1e-5)


def test_half_precision_is_read(tmp_path: Path, base: Checkpoint) -> None:
    tensors = {name: tensor.astype(np.float16) for name, tensor in _pair("blk.0.attn_v.weight", 32).items()}
    delta = GgufLora("a", _adapter(tmp_path / "a", tensors), base).delta(
        "model.layers.0.self_attn.v_proj.weight"
    )
    assert delta is not None
    assert torch.equal(delta.down, torch.tensor(tensors["blk.0.attn_v.weight.lora_a"]).float())


def test_what_does_not_fit_is_refused(tmp_path: Path, base: Checkpoint) -> None:
    good = _pair("blk.0.attn_v.weight", 32)
    lone = {name: tensor for name, tensor in good.items() if name.endswith("a")}
    cases: dict[str, tuple[Path, type[Exception], str]] = {
        "model": (
            _adapter(tmp_path / "1", good, **{"general.type": "model"}),
            CheckpointError,
            "full model as safe",
        ),
        "architecture": (
            _adapter(tmp_path / "2", good, architecture="qwen2"),
            MismatchError,
            "for 'qwen2' models",
        ),
        "lone": (_adapter(tmp_path / "3", lone), CheckpointError, "only one LoRA factor"),
        "layer": (_adapter(tmp_path / "4", _pair("blk.7.attn_v.weight", 32)), MismatchError, "no matrix of"),
        "shape": (_adapter(tmp_path / "5", _pair("blk.0.attn_v.weight", 48)), MismatchError, "has shape"),
        "empty": (_adapter(tmp_path / "6", {}), CheckpointError, "holds no LoRA tensors"),
        "alpha": (_adapter(tmp_path / "7", good, float("nan")), CheckpointError, "finite number"),
        "norm": (
            _adapter(tmp_path / "8", {"blk.0.attn_norm.weight": np.ones(64, np.float32)}),
            CheckpointError,
            "not part of a LoRA product",
        ),
        "embedding": (_adapter(tmp_path / "9", _pair("token_embd.weight", 320)), MismatchError, "tie"),
    }
    for folder, error, message in cases.values():
        with pytest.raises(error, match=message):
            open_fine_tune("a", folder, base)


def _head(tensors: int = 0, fields: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    return (
        _string(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        _head(magic=b"PK\3\4"),
        _head(version=1),
        _head(tensors=2**63),
        _head(fields=2**63),
        _head(fields=1) + struct.pack("<Q", 2**63),
        _head(fields=1) + _string("k") + struct.pack("<I", 99),
        _head(fields=1) + _string("k") + struct.pack("<IIQ", 9, 4, 2**40),
        _head(fields=1) + _string("k") + struct.pack("<IIQ", 9, 9, 1),
        _head(fields=1) + _string("k") + struct.pack("<IQ", 8, 100) + b"short",
        _head(fields=1) + _string("general.alignment") + struct.pack("<II", 4, 3),
        _head(tensors=1) + _tensor("a", (2**40, 2**40), 0),
        _head(tensors=1) + _tensor("a", (4,), 2**40),
        _head(tensors=1) + _tensor("a", (0,), 0),
        _head(tensors=1) + _tensor("a", (1,) * 5, 0),
        _head(tensors=1) + _tensor("a", (32,), 0, kind=2) + bytes(256),
        _head(tensors=2) + _tensor("a", (4,), 0) + _tensor("b", (4,), 8) + bytes(256),
        _head(tensors=2) + _tensor("a", (4,), 0) + _tensor("a", (4,), 16) + bytes(256),
    ],
)
def test_a_broken_or_hostile_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        read_gguf(path)


def test_two_adapters_in_one_folder_are_ambiguous(tmp_path: Path, base: Checkpoint) -> None:
    folder = _adapter(tmp_path / "a", _pair("blk.0.attn_v.weight", 32))
    (folder / "b.gguf").write_bytes((folder / "a.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        open_fine_tune("a", folder, base)
