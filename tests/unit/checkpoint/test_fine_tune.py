from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint, FullFineTune, open_fine_tune
from experts.errors import CheckpointError, MismatchError
from tests.unit.checkpoint.folders import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    NORM,
    VOCABULARY,
    Q,
    near,
    random_weights,
    write_json,
    write_model,
)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_model(tmp_path / "base", random_weights(0)))


def test_a_full_fine_tune_is_the_difference_in_float32(tmp_path: Path, base: Checkpoint) -> None:
    weights = random_weights(0)
    weights[Q] = weights[Q] + 0.5
    tuned = open_fine_tune("a", write_model(tmp_path / "a", weights), base)
    assert isinstance(tuned, FullFineTune)
    assert tuned.name == "a"
    assert tuned.touched() == {Q}
    delta = tuned.delta(Q)
    assert isinstance(delta, torch.Tensor)
    torch.testing.assert_close(delta, weights[Q] - random_weights(0)[Q], rtol=0, atol=0)
    assert tuned.delta(NORM) is None
    torch.testing.assert_close(tuned.tensor(Q), weights[Q], rtol=0, atol=0)


def test_a_fine_tune_in_another_dtype_differs_only_where_its_values_do(tmp_path: Path) -> None:
    weights = {name: weight.to(torch.bfloat16) for name, weight in random_weights(0).items()}
    base = Checkpoint.open(write_model(tmp_path / "base", weights))
    wide = {name: weight.to(torch.float32) for name, weight in weights.items()}
    wide[Q] = wide[Q] + 1
    tuned = open_fine_tune("a", write_model(tmp_path / "a", wide), base)
    assert tuned.touched() == {Q}
    delta = tuned.delta(Q)
    assert isinstance(delta, torch.Tensor)
    assert delta.dtype == torch.float32


def test_another_architecture_is_refused(tmp_path: Path, base: Checkpoint) -> None:
    path = write_model(tmp_path / "a", random_weights(1), architectures=["Qwen3ForCausalLM"])
    with pytest.raises(MismatchError, match=r"Qwen3ForCausalLM.*LlamaForCausalLM"):
        open_fine_tune("a", path, base)


def test_a_config_that_changes_the_function_is_refused(tmp_path: Path, base: Checkpoint) -> None:
    path = write_model(tmp_path / "a", random_weights(1), num_attention_heads=3)
    with pytest.raises(MismatchError, match=r"num_attention_heads = 3, the base has 2"):
        open_fine_tune("a", path, base)


def test_another_shape_names_the_tensor(tmp_path: Path, base: Checkpoint) -> None:
    weights = {**random_weights(1), Q: torch.zeros(HIDDEN, HIDDEN + 1)}
    with pytest.raises(MismatchError, match=r"q_proj\.weight has shape \[6, 7\], the base has \[6, 6\]"):
        open_fine_tune("a", write_model(tmp_path / "a", weights), base)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_another_vocabulary_names_the_tensor(tmp_path: Path, base: Checkpoint, name: str) -> None:
    weights = {**random_weights(1), name: torch.zeros(VOCABULARY + 3, HIDDEN)}
    with pytest.raises(MismatchError, match=rf"another vocabulary: {name} has 15 rows, the base has 12"):
        open_fine_tune("a", write_model(tmp_path / "a", weights), base)


def test_a_missing_or_surplus_parameter_is_named(tmp_path: Path, base: Checkpoint) -> None:
    weights = random_weights(1)
    surplus = write_model(tmp_path / "surplus", {**weights, "model.extra.weight": torch.ones(2)})
    with pytest.raises(MismatchError, match=r"model\.extra\.weight that the base lacks"):
        open_fine_tune("a", surplus, base)
    del weights[NORM]
    with pytest.raises(MismatchError, match=r"lacks the base's parameter model\.norm\.weight"):
        open_fine_tune("a", write_model(tmp_path / "missing", weights), base)


def test_an_untied_head_on_a_tied_base_is_named_with_the_mend(tmp_path: Path) -> None:
    tied = random_weights(0)
    del tied[HEAD]
    base = Checkpoint.open(write_model(tmp_path / "base", tied, tie_word_embeddings=True))
    untied = write_model(tmp_path / "a", random_weights(0), tie_word_embeddings=False)
    with pytest.raises(MismatchError, match=r"lm_head\.weight that the base lacks.*tie_word_embeddings=true"):
        open_fine_tune("a", untied, base)


def test_a_folder_that_is_no_fine_tune_is_refused(tmp_path: Path, base: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        open_fine_tune("a", tmp_path / "nowhere", base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        open_fine_tune("a", tmp_path / "empty", base)


def tokenizer(**vocabulary: int) -> dict[str, object]:
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b"]},
        "added_tokens": [{"id": 9, "content": "<end>", "special": True}],
        "normalizer": None,
    }


def test_a_tokenizer_that_gives_other_ids_is_refused_and_names_a_token(
    tmp_path: Path, base: Checkpoint
) -> None:
    path = write_model(tmp_path / "a", near(random_weights(0), 1))
    write_json(base.path / "tokenizer.json", tokenizer(a=0, b=1))
    open_fine_tune("a", path, base)  # brings none: the base's is used

    write_json(path / "tokenizer.json", {**tokenizer(b=1, a=0), "padding": {"length": 3}})
    open_fine_tune("a", path, base)

    write_json(
        path / "tokenizer.json",
        {**tokenizer(a=0, b=1), "model": {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}},
    )
    open_fine_tune("a", path, base)

    write_json(path / "tokenizer.json", tokenizer(a=1, b=0))
    with pytest.raises(
        MismatchError, match=r"tokenizer\.json gives token 'a' the id 1, the base's tokenizer 0"
    ):
        open_fine_tune("a", path, base)

    write_json(path / "tokenizer.json", tokenizer(a=0, b=1, c=2))
    with pytest.raises(MismatchError, match="'c'"):
        open_fine_tune("a", path, base)

    write_json(path / "tokenizer.json", {**tokenizer(a=0, b=1), "normalizer": {"type": "Lowercase"}})
    with pytest.raises(MismatchError, match="normalizer"):
        open_fine_tune("a", path, base)

    write_json(path / "tokenizer.json", {**tokenizer(), "model": {"vocab": {"a": 0, "b": 1}, "merges": []}})
    with pytest.raises(MismatchError, match="merges"):
        open_fine_tune("a", path, base)

    write_json(path / "tokenizer.json", {"model": 3})
    with pytest.raises(CheckpointError, match=r"not a tokenizer\.json"):
        open_fine_tune("a", path, base)


def test_slow_tokenizer_files_are_compared_too(tmp_path: Path, base: Checkpoint) -> None:
    path = write_model(tmp_path / "a", near(random_weights(0), 1))
    (base.path / "tokenizer.model").write_bytes(b"one")
    (path / "tokenizer.model").write_bytes(b"two")
    with pytest.raises(MismatchError, match=r"tokenizer\.model differs"):
        open_fine_tune("a", path, base)
    write_json(base.path / "vocab.json", {"a": 0})
    (path / "tokenizer.model").write_bytes(b"one")
    (path / "vocab.json").write_text('{ "a": 0 }')
    open_fine_tune("a", path, base)
