import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experts.checkpoint import Checkpoint
from experts.errors import CheckpointError
from tests.unit.checkpoint.folders import (
    EMBEDDING,
    HEAD,
    NORM,
    SHAPES,
    Q,
    random_weights,
    write_json,
    write_model,
)


def write_sharded(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    write_model(path, weights)
    (path / "model.safetensors").unlink()
    names = list(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, path / shard)
    write_json(
        path / "model.safetensors.index.json",
        {"weight_map": {name: shard for shard, members in shards.items() for name in members}},
    )
    return path


def test_tensors_come_back_as_stored(tmp_path: Path) -> None:
    weights = random_weights(0)
    weights[NORM] = weights[NORM].to(torch.bfloat16)
    checkpoint = Checkpoint.open(write_model(tmp_path, weights))
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert set(checkpoint.names) == set(SHAPES)
    for name in checkpoint.names:
        assert checkpoint.shape(name) == SHAPES[name]
        assert checkpoint.dtype(name) == weights[name].dtype
        torch.testing.assert_close(checkpoint.tensor(name), weights[name], rtol=0, atol=0)
    assert checkpoint.nbytes == sum(weight.nbytes for weight in weights.values())
    assert checkpoint.embedding == EMBEDDING
    assert Q in checkpoint
    assert "model.nothing" not in checkpoint


def test_shards_read_as_one_model_with_the_same_fingerprint(tmp_path: Path) -> None:
    weights = random_weights(0)
    whole = Checkpoint.open(write_model(tmp_path / "whole", weights))
    sharded = Checkpoint.open(write_sharded(tmp_path / "sharded", weights))
    assert set(sharded.names) == set(whole.names)
    assert len(sharded.files) == 2
    for name in whole.names:
        torch.testing.assert_close(sharded.tensor(name), whole.tensor(name), rtol=0, atol=0)
    assert sharded.fingerprint() == whole.fingerprint()


def test_the_fingerprint_changes_with_any_weight_and_with_the_config_but_not_with_its_bookkeeping(
    tmp_path: Path,
) -> None:
    weights = random_weights(0)
    first = Checkpoint.open(write_model(tmp_path / "a", weights)).fingerprint()
    same = Checkpoint.open(write_model(tmp_path / "b", weights, transformers_version="9", use_cache=False))
    other_config = Checkpoint.open(write_model(tmp_path / "c", weights, rope_theta=5.0))
    weights[NORM][0] += 1e-6
    other_weights = Checkpoint.open(write_model(tmp_path / "d", weights))
    assert same.fingerprint() == first
    assert other_config.fingerprint() != first
    assert other_weights.fingerprint() != first


def test_a_tied_head_that_is_stored_twice_appears_once(tmp_path: Path) -> None:
    weights = random_weights(0)
    weights[HEAD] = weights[EMBEDDING].clone()
    assert (
        HEAD not in Checkpoint.open(write_model(tmp_path / "tied", weights, tie_word_embeddings=True)).names
    )
    assert HEAD in Checkpoint.open(write_model(tmp_path / "untied", weights)).names


def test_computed_buffers_are_not_parameters_and_a_missing_prefix_is_added(tmp_path: Path) -> None:
    weights = {
        "wte.weight": torch.randn(8, 4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "h.0.attn.c_attn.bias": torch.randn(12),
        "ln_f.weight": torch.randn(4),
    }
    path = write_model(tmp_path, weights, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    checkpoint = Checkpoint.open(path)
    assert set(checkpoint.names) == {
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.bias",
        "transformer.ln_f.weight",
    }
    torch.testing.assert_close(checkpoint.tensor("transformer.ln_f.weight"), weights["ln_f.weight"])


def test_an_unknown_parameter_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_model(tmp_path, random_weights(0)))
    with pytest.raises(CheckpointError, match=r"no parameter model\.nothing"):
        checkpoint.tensor("model.nothing")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "weights.ckpt", "model.pkl"]
)
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, random_weights(0))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle.*safe_serialization"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_remote_code_is_refused(tmp_path: Path, name: str) -> None:
    write_model(tmp_path, random_weights(0))
    path = tmp_path / name
    content = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**content, "auto_map": {"AutoConfig": "evil.Config"}})
    with pytest.raises(CheckpointError, match=rf"{name} has an auto_map"):
        Checkpoint.open(tmp_path)


def test_a_missing_folder_or_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Checkpoint.open(tmp_path)
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON list, expected an object"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "names no architecture"),
        ('{"architectures": [3]}', "names no architecture"),
        ('{"architectures": ["X"], "quantization_config": {"bits": 4}}', "quantised"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, content: str, message: str) -> None:
    write_model(tmp_path, random_weights(0))
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, {**random_weights(0), Q: torch.ones(2, 2, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has dtype torch\.int8.*dequantise"):
        Checkpoint.open(tmp_path)


def header_file(path: Path, table: object, data: bytes = b"") -> None:
    raw = json.dumps(table).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        ([], b"", "corrupt safetensors header"),
        ({"w": 3}, b"", "corrupt safetensors header"),
        ({"w": {"dtype": "F32"}}, b"", "corrupt safetensors header"),
        ({"w": {**ONE, "shape": [-1]}}, b"aaaa", "not counts"),
        ({"w": {**ONE, "shape": [True]}}, b"aaaa", "not counts"),
        ({"w": {**ONE, "shape": [2]}}, b"aaaa", "4 bytes, its shape and dtype need 8"),
        ({"w": {**ONE, "shape": [10**30]}}, b"aaaa", "its shape and dtype need"),
        ({"w": {**ONE, "dtype": "F8_E4M3"}}, b"aaaa", "w is stored as F8_E4M3.*dequantise"),
        ({"w": {**ONE, "data_offsets": [4, 8]}}, b"aaaabbbb", "does not begin where"),
        ({"w": ONE, "v": ONE}, b"aaaa", "does not begin where"),
        ({"w": ONE}, b"aaa", "truncated"),
        ({"w": ONE}, b"aaaaa", "surplus"),
    ],
)
def test_an_inconsistent_header_is_refused_and_the_file_named(
    tmp_path: Path, table: object, data: bytes, message: str
) -> None:
    write_model(tmp_path, random_weights(0))
    header_file(tmp_path / "model.safetensors", table, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"abc", "truncated"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "declares a header"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "corrupt"),
        ((15).to_bytes(8, "little") + b'{"a":1,"a": 12}', "a key appears twice"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_model(tmp_path, random_weights(0))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_an_oversized_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write_model(tmp_path, random_weights(0))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse
    with pytest.raises(CheckpointError, match="declares a header of 200000000 bytes"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, {Q: torch.randn(3, 3)})
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", 3, ".."]
)
def test_an_index_cannot_point_out_of_the_folder(tmp_path: Path, shard: object) -> None:
    path = write_sharded(tmp_path, random_weights(0))
    write_json(path / "model.safetensors.index.json", {"weight_map": {Q: shard}})
    with pytest.raises(CheckpointError, match="same folder"):
        Checkpoint.open(path)


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    path = write_sharded(tmp_path, random_weights(0))
    index = path / "model.safetensors.index.json"
    write_json(index, {})
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(path)
    write_json(index, {"weight_map": {"model.other": "a.safetensors"}})
    with pytest.raises(CheckpointError, match=r"maps model\.other to a\.safetensors, which lacks it"):
        Checkpoint.open(path)
    write_json(index, {"weight_map": {Q: "gone.safetensors"}})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read"):
        Checkpoint.open(path)
    save_file({EMBEDDING: torch.ones(1)}, path / "b.safetensors")
    write_json(index, {"weight_map": {EMBEDDING: "a.safetensors", "x": "b.safetensors"}})
    with pytest.raises(CheckpointError, match="lacks it"):
        Checkpoint.open(path)
    write_json(index, {"weight_map": {EMBEDDING: "a.safetensors", Q: "b.safetensors"}})
    with pytest.raises(CheckpointError):
        Checkpoint.open(path)
