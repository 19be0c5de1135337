from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experts.checkpoint import Checkpoint, write_checkpoint
from experts.errors import CheckpointError, MismatchError
from experts.factors import LowRank
from tests.unit.checkpoint.folders import (
    EMBEDDING,
    HEAD,
    NORM,
    UP,
    Q,
    random_weights,
    write_json,
    write_model,
)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    weights = random_weights(0)
    weights[NORM] = weights[NORM].to(torch.float64)
    weights[Q] = weights[Q].to(torch.bfloat16)
    weights[HEAD] = weights[HEAD].to(torch.float16)
    return Checkpoint.open(write_model(tmp_path / "base", weights, _name_or_path="somewhere"))


def test_a_written_model_is_base_plus_change_in_the_bases_dtypes(tmp_path: Path, base: Checkpoint) -> None:
    dense = {Q: torch.full((6, 6), 0.3), NORM: torch.full((6,), 1e-3)}
    low = LowRank(torch.randn(10, 2), torch.randn(2, 6))
    done: list[str] = []
    # Any order will do, and what does not come stays as it is.
    deltas = [(UP, low), *dense.items(), (EMBEDDING, None)]
    write_checkpoint(base, deltas, tmp_path / "out", progress=done.append)
    written = Checkpoint.open(tmp_path / "out")
    assert set(written.names) == set(base.names)
    assert done[:4] == [UP, Q, NORM, EMBEDDING]
    assert sorted(done) == sorted(base.names)
    for name in base.names:
        before = base.tensor(name)
        expected = before
        if name in dense:
            expected = (before.to(torch.promote_types(before.dtype, torch.float32)) + dense[name]).to(
                before.dtype
            )
        if name == UP:
            expected = before + low.dense()
        assert written.dtype(name) == base.dtype(name)
        torch.testing.assert_close(written.tensor(name), expected, rtol=0, atol=0)
    # The reference reader agrees with ours about the file.
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(base.names)


@pytest.mark.parametrize("limit", [1, 200, 500])
def test_shards_keep_to_the_limit_and_read_as_the_same_model(
    tmp_path: Path, base: Checkpoint, limit: int
) -> None:
    write_checkpoint(base, [], tmp_path / "out", max_shard_bytes=limit)
    written = Checkpoint.open(tmp_path / "out")
    assert len(written.files) > 1
    largest = max(base.stored(name).nbytes for name in base.names)
    for file in written.files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= max(limit, largest)
    assert written.fingerprint() == base.fingerprint()


def test_config_tokenizer_template_and_licence_are_copied_but_no_code(
    tmp_path: Path, base: Checkpoint
) -> None:
    kept = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    for name in kept:
        write_json(base.path / name, {})
    (base.path / "chat_template.jinja").write_text("{{ messages }}")
    (base.path / "LICENSE").write_text("free")
    (base.path / "additional_chat_templates").mkdir()
    (base.path / "additional_chat_templates" / "tool.jinja").write_text("x")
    for name in ("modeling_evil.py", "pytorch_model.bin", "training_args.bin"):
        (base.path / name).write_bytes(b"x")
    write_checkpoint(base, [], tmp_path / "out")
    files = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert files == {
        *kept,
        "config.json",
        "model.safetensors",
        "chat_template.jinja",
        "LICENSE",
        "additional_chat_templates/tool.jinja",
    }
    assert "_name_or_path" not in Checkpoint.open(tmp_path / "out").config


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    weights = random_weights(0)
    weights[HEAD] = weights[EMBEDDING].clone()
    base = Checkpoint.open(write_model(tmp_path / "base", weights, tie_word_embeddings=True))
    write_checkpoint(base, [(EMBEDDING, torch.ones(12, 6))], tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert HEAD not in stored
    torch.testing.assert_close(stored[EMBEDDING], weights[EMBEDDING] + 1)


def test_changes_that_do_not_fit_are_named(tmp_path: Path, base: Checkpoint) -> None:
    with pytest.raises(MismatchError, match=r"model\.nothing"):
        write_checkpoint(base, [("model.nothing", None)], tmp_path / "a")
    with pytest.raises(MismatchError, match=r"q_proj\.weight came twice"):
        write_checkpoint(base, [(Q, None), (Q, None)], tmp_path / "b")
    with pytest.raises(MismatchError, match=r"q_proj\.weight changes by \[2, 2\], the base has \[6, 6\]"):
        write_checkpoint(base, [(Q, torch.ones(2, 2))], tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* not finite in torch\.float16"):
        write_checkpoint(base, [(HEAD, torch.full((12, 6), 1e6))], tmp_path / "d")


def test_the_base_is_never_overwritten(base: Checkpoint) -> None:
    before = base.fingerprint()
    with pytest.raises(CheckpointError, match="the base itself"):
        write_checkpoint(base, [], base.path)
    assert Checkpoint.open(base.path).fingerprint() == before
