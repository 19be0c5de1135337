from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.checkpoint import Checkpoint, LoraFineTune, open_fine_tune
from experts.errors import CheckpointError, MismatchError
from experts.factors import LowRank
from tests.unit.checkpoint.folders import (
    DOWN,
    EMBEDDING,
    HEAD,
    HIDDEN,
    NORM,
    UP,
    UP_BIAS,
    VOCABULARY,
    Q,
    lora_factors,
    random_weights,
    write_lora,
    write_model,
)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_model(tmp_path / "base", random_weights(0)))


@pytest.fixture
def tied_base(tmp_path: Path) -> Checkpoint:
    weights = random_weights(0)
    del weights[HEAD]
    return Checkpoint.open(write_model(tmp_path / "tied", weights, tie_word_embeddings=True))


def product(factors: dict[str, Tensor], name: str) -> Tensor:
    module = name.removesuffix(".weight")
    return factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]


def low_rank(tuned: Any, name: str) -> LowRank:
    delta = tuned.delta(name)
    assert isinstance(delta, LowRank)
    return delta


def test_a_lora_is_the_product_of_its_factors_times_alpha_over_rank(tmp_path: Path, base: Checkpoint) -> None:
    factors = lora_factors(UP, 1) | lora_factors(Q, 2)
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", factors), base)
    assert isinstance(tuned, LoraFineTune)
    assert tuned.touched() == {UP, Q}
    for name in (UP, Q):
        delta = low_rank(tuned, name)
        assert delta.rank == 2
        assert delta.up.dtype == torch.float32
        torch.testing.assert_close(delta.dense(), 2 * product(factors, name))
    assert tuned.delta(NORM) is None
    assert tuned.tensor(Q) is None


def test_sixteen_bit_factors_are_multiplied_in_float32(tmp_path: Path, base: Checkpoint) -> None:
    factors = {name: factor.to(torch.bfloat16) for name, factor in lora_factors(UP, 1).items()}
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", factors), base)
    exact = {name: factor.to(torch.float32) for name, factor in factors.items()}
    torch.testing.assert_close(low_rank(tuned, UP).dense(), 2 * product(exact, UP))


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank(tmp_path: Path, base: Checkpoint) -> None:
    factors = lora_factors(UP, 1, rank=4)
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", factors, r=4, lora_alpha=6, use_rslora=True), base)
    torch.testing.assert_close(low_rank(tuned, UP).dense(), 3 * product(factors, UP))


def test_rank_and_alpha_patterns_apply_to_the_modules_they_match(tmp_path: Path, base: Checkpoint) -> None:
    factors = lora_factors(UP, 1, rank=4) | lora_factors(DOWN, 2) | lora_factors(Q, 3)
    path = write_lora(
        tmp_path / "a",
        factors,
        rank_pattern={"up_proj": 4},
        alpha_pattern={"up_proj": 40, r"layers\.\d+\.mlp\.down_proj": 6},
    )
    tuned = open_fine_tune("a", path, base)
    torch.testing.assert_close(low_rank(tuned, UP).dense(), 10 * product(factors, UP))
    torch.testing.assert_close(low_rank(tuned, DOWN).dense(), 3 * product(factors, DOWN))
    torch.testing.assert_close(low_rank(tuned, Q).dense(), 2 * product(factors, Q))


@pytest.mark.parametrize("key", ["(a+)+", "(?=x)", "a*b*c*", "x" * 300, "(a)\\1"])
def test_a_pattern_that_could_backtrack_for_ever_is_refused(
    tmp_path: Path, base: Checkpoint, key: str
) -> None:
    path = write_lora(tmp_path / "a", lora_factors(Q, 1), alpha_pattern={key: 3})
    with pytest.raises(CheckpointError, match="too intricate"):
        open_fine_tune("a", path, base)


def test_conv1d_weights_get_the_transposed_product(tmp_path: Path) -> None:
    attention, projection = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"
    base = Checkpoint.open(
        write_model(
            tmp_path / "base",
            {attention: torch.randn(6, 18), projection: torch.randn(6, 6)},
            architectures=["GPT2LMHeadModel"],
            model_type="gpt2",
        )
    )
    factors = lora_factors(attention, 1, shape=(18, 6)) | lora_factors(projection, 2, shape=(6, 6))
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", factors), base)
    for name in (attention, projection):  # the square one does not show its orientation
        torch.testing.assert_close(low_rank(tuned, name).dense(), 2 * product(factors, name).T)


def test_fan_in_fan_out_turns_a_square_weight(tmp_path: Path, base: Checkpoint) -> None:
    factors = lora_factors(Q, 1)
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", factors, fan_in_fan_out=True), base)
    torch.testing.assert_close(low_rank(tuned, Q).dense(), 2 * product(factors, Q).T)


def test_modules_to_save_and_biases_are_dense_replacements(tmp_path: Path, base: Checkpoint) -> None:
    norm, bias = torch.randn(HIDDEN), torch.randn(10)
    wrapped_bias = UP_BIAS.replace(".bias", ".base_layer.bias")
    tensors = lora_factors(UP, 1) | {NORM: norm, wrapped_bias: bias}
    tuned = open_fine_tune(
        "a", write_lora(tmp_path / "a", tensors, modules_to_save=["norm"], bias="all"), base
    )
    assert tuned.touched() == {UP, NORM, UP_BIAS}
    torch.testing.assert_close(tuned.delta(NORM), norm - base.tensor(NORM))
    torch.testing.assert_close(tuned.delta(UP_BIAS), bias - base.tensor(UP_BIAS))
    torch.testing.assert_close(tuned.tensor(NORM), norm)


def test_a_bias_of_the_second_factor_is_scaled_like_the_product(tmp_path: Path, base: Checkpoint) -> None:
    bias = torch.randn(10)
    tensors = lora_factors(UP, 1) | {UP_BIAS.replace(".bias", ".lora_B.bias"): bias}
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", tensors, lora_bias=True), base)
    torch.testing.assert_close(tuned.delta(UP_BIAS), 2 * bias)


def embedding_factors() -> dict[str, Tensor]:
    module = EMBEDDING.removesuffix(".weight")
    return {
        f"{module}.lora_embedding_A": torch.randn(2, VOCABULARY),
        f"{module}.lora_embedding_B": torch.randn(HIDDEN, 2),
    }


def test_an_embedding_lora_is_transposed_and_pefts_copy_of_the_weight_ignored(
    tmp_path: Path, base: Checkpoint
) -> None:
    factors = embedding_factors()
    copy = {EMBEDDING.replace(".weight", ".base_layer.weight"): base.tensor(EMBEDDING).clone()}
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", factors | copy), base)
    down, up = factors.values()
    torch.testing.assert_close(low_rank(tuned, EMBEDDING).dense(), 2 * (up @ down).T)
    assert tuned.tensor(EMBEDDING) is None


def test_a_tied_embedding_can_change_only_with_its_head(tmp_path: Path, tied_base: Checkpoint) -> None:
    factors = embedding_factors()
    with pytest.raises(MismatchError, match=rf"{EMBEDDING} without the output head.*ensure_weight_tying"):
        open_fine_tune("a", write_lora(tmp_path / "a", factors), tied_base)
    head = lora_factors(HEAD, 1)
    with pytest.raises(MismatchError, match=r"lm_head\.weight.*cannot change alone"):
        open_fine_tune("a", write_lora(tmp_path / "b", head), tied_base)
    both = factors | head
    tuned = open_fine_tune("a", write_lora(tmp_path / "c", both, ensure_weight_tying=True), tied_base)
    assert tuned.touched() == {EMBEDDING}


def test_an_embedding_that_peft_saved_unchanged_counts_as_untouched(
    tmp_path: Path, tied_base: Checkpoint
) -> None:
    tensors = lora_factors(Q, 1) | {EMBEDDING: tied_base.tensor(EMBEDDING).clone()}
    tuned = open_fine_tune("a", write_lora(tmp_path / "a", tensors), tied_base)
    assert tuned.touched() == {Q}


def test_another_vocabulary_names_the_tensor(tmp_path: Path, base: Checkpoint) -> None:
    module = EMBEDDING.removesuffix(".weight")
    resized = embedding_factors() | {f"{module}.lora_embedding_A": torch.randn(2, VOCABULARY + 1)}
    with pytest.raises(MismatchError, match=rf"another vocabulary: {EMBEDDING} has 13 rows"):
        open_fine_tune("a", write_lora(tmp_path / "a", resized), base)
    saved = lora_factors(Q, 1) | {HEAD: torch.randn(VOCABULARY + 1, HIDDEN)}
    with pytest.raises(MismatchError, match=rf"another vocabulary: {HEAD} has 13 rows"):
        open_fine_tune("a", write_lora(tmp_path / "b", saved), base)


def test_a_tensor_that_does_not_fit_the_base_is_named(tmp_path: Path, base: Checkpoint) -> None:
    unknown = {name.replace("q_proj", "z_proj"): factor for name, factor in lora_factors(Q, 1).items()}
    with pytest.raises(MismatchError, match=r"z_proj\.weight, which the base lacks"):
        open_fine_tune("a", write_lora(tmp_path / "a", unknown), base)
    wide = lora_factors(Q, 1, shape=(HIDDEN, HIDDEN + 1))
    with pytest.raises(MismatchError, match=r"q_proj\.weight has shape \[6, 7\], the base has \[6, 6\]"):
        open_fine_tune("a", write_lora(tmp_path / "b", wide), base)
    crossed = lora_factors(Q, 1) | {Q.replace(".weight", ".lora_A.weight"): torch.ones(3, HIDDEN)}
    with pytest.raises(MismatchError, match="do not multiply"):
        open_fine_tune("a", write_lora(tmp_path / "c", crossed), base)
    with pytest.raises(MismatchError, match=r"q_proj\.weight have rank 3, adapter_config\.json says 2"):
        open_fine_tune("a", write_lora(tmp_path / "d", lora_factors(Q, 1, rank=3)), base)
    replaced = lora_factors(Q, 1) | {Q: torch.ones(HIDDEN, HIDDEN)}
    with pytest.raises(MismatchError, match=r"q_proj\.weight is both"):
        open_fine_tune("a", write_lora(tmp_path / "e", replaced), base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "only LORA"),
        ({"use_dora": True}, "sets use_dora"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"some_new_field": {"x": 1}}, "sets some_new_field"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*plain LoRA"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": None}, "r is None"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"x": "y"}}, "alpha_pattern"),
        ({"auto_map": {"a": "b"}}, "auto_map"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused_by_name(
    tmp_path: Path, base: Checkpoint, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_fine_tune("a", write_lora(tmp_path / "a", lora_factors(Q, 1), **config), base)


def test_foreign_keys_half_pairs_and_empty_adapters_are_refused(tmp_path: Path, base: Checkpoint) -> None:
    module = Q.removesuffix(".weight")
    magnitude = lora_factors(Q, 1) | {f"{module}.lora_magnitude_vector": torch.ones(HIDDEN)}
    with pytest.raises(CheckpointError, match="lora_magnitude_vector is not part of a plain LoRA"):
        open_fine_tune("a", write_lora(tmp_path / "a", magnitude), base)
    half = lora_factors(Q, 1)
    del half[f"{module}.lora_A.weight"]
    with pytest.raises(CheckpointError, match="only one LoRA factor of"):
        open_fine_tune("a", write_lora(tmp_path / "b", half), base)
    lone_bias = {UP_BIAS.replace(".bias", ".lora_B.bias"): torch.ones(10)}
    with pytest.raises(CheckpointError, match=r"lora_B\.bias .* has no LoRA factors"):
        open_fine_tune("a", write_lora(tmp_path / "d", lone_bias), base)
    with pytest.raises(CheckpointError, match="change nothing"):
        open_fine_tune("a", write_lora(tmp_path / "c", {}), base)


def test_a_pickled_adapter_is_refused(tmp_path: Path, base: Checkpoint) -> None:
    path = write_lora(tmp_path / "a", lora_factors(Q, 1))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        open_fine_tune("a", path, base)
