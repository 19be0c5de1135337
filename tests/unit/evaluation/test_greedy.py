"""Promises of the fast generator: the answers of `generate`, whatever prefix, batch, gates and early ends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.evaluation.features import prefixed_features
from experts.evaluation.gated import GatedModel
from experts.evaluation.generation import plain_generator
from experts.evaluation.greedy import Ask, Greedy
from experts.evaluation.settled import settled
from experts.factors import SvdFactors
from experts.routing import FeatureSpec, extract_features
from tests.fixtures.tiny import tiny_model

WORDS = "fox dog quick brown lazy over the jumps and then capital country name"
PROMPTS = [f"say {' '.join(WORDS.split()[i : i + 1 + i % 5])} {i}" for i in range(11)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    # In float64 no two logits are so close that the order of additions decides between them.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def chat(prompt: str) -> str:
    return f"<|im_start|>system\nthe quick brown fox<|im_end|>\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def prefix_of(tokenizer: Any) -> list[int]:
    text = chat("\0").partition("\0")[0]
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("shared", [True, False])
def test_answers_are_those_of_generate(model: Any, tokenizer: Any, batch: int, shared: bool) -> None:
    texts = [chat(prompt) for prompt in PROMPTS]
    expected = plain_generator(model, tokenizer, 1)(texts, 12)
    greedy = Greedy(model, tokenizer, prefix_of(tokenizer) if shared else (), batch)
    assert greedy.texts(texts, 12) == expected
    assert len(set(expected)) > 1


def test_every_prompt_has_its_own_limit(model: Any, tokenizer: Any) -> None:
    texts = [chat(prompt) for prompt in PROMPTS]
    asks = [Ask(text, 1 + i) for i, text in enumerate(texts)]
    expected = [plain_generator(model, tokenizer, 1)([ask.text], ask.limit)[0] for ask in asks]
    assert Greedy(model, tokenizer, prefix_of(tokenizer)).answers(asks) == expected


def test_prompts_without_the_prefix_are_answered_beside_those_with_it(model: Any, tokenizer: Any) -> None:
    texts = [chat(PROMPTS[0]), PROMPTS[1], chat(PROMPTS[2]), PROMPTS[3]]
    expected = plain_generator(model, tokenizer, 1)(texts, 6)
    assert Greedy(model, tokenizer, prefix_of(tokenizer)).texts(texts, 6) == expected


def test_a_settled_answer_ends_and_the_others_go_on(model: Any, tokenizer: Any) -> None:
    texts = [chat(prompt) for prompt in PROMPTS]
    whole = plain_generator(model, tokenizer, 1)(texts, 12)
    rule = settled("exact", whole[0])
    got = Greedy(model, tokenizer, prefix_of(tokenizer)).answers([Ask(text, 12, rule) for text in texts])
    assert got[0] == whole[0]
    assert all(full.startswith(cut) for cut, full in zip(got, whole, strict=True))
    assert any(cut != full for cut, full in zip(got, whole, strict=True))


def test_each_row_is_answered_by_its_own_gates(model: Any, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    parameters = dict(model.named_parameters())

    def expert() -> dict[str, SvdFactors]:
        found = {}
        for name in names:
            rows, columns = parameters[name].shape
            u, v = torch.randn(rows, 3, generator=generator), torch.randn(3, columns, generator=generator)
            found[name] = SvdFactors(u / rows**0.5, torch.tensor([0.9, 0.5, 0.2]), v / columns**0.5)
        return found

    experts = [expert(), expert()]
    choices = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.75)]
    gates = torch.tensor([choices[i % 4] for i in range(len(PROMPTS))])
    texts = [chat(prompt) for prompt in PROMPTS]
    expected = []
    for text, row in zip(texts, gates.tolist(), strict=True):
        plain = {name: parameters[name].detach().clone() for name in names}
        with torch.no_grad():
            for name in names:
                for weight, factors in zip(row, experts, strict=True):
                    parameters[name].add_(weight * factors[name].dense())
        expected += plain_generator(model, tokenizer, 1)([text], 8)
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(plain[name])
    gated = GatedModel(model, experts)
    try:
        got = Greedy(model, tokenizer, prefix_of(tokenizer), 4).answers(
            [Ask(text, 8) for text in texts], gates, gated
        )
    finally:
        gated.close()
    assert got == expected
    assert got != plain_generator(model, tokenizer)(texts, 8)


@pytest.mark.parametrize(
    "spec",
    [FeatureSpec(layer=1), FeatureSpec(layer=2, taps=(1,)), FeatureSpec(), FeatureSpec(pooling="mean")],
)
def test_features_with_a_shared_prefix_are_the_routers(model: Any, tokenizer: Any, spec: FeatureSpec) -> None:
    ids = [tokenizer(chat(prompt), add_special_tokens=False).input_ids for prompt in PROMPTS]
    got = prefixed_features(model, ids, prefix_of(tokenizer), spec)
    torch.testing.assert_close(got, extract_features(model, ids, spec), rtol=1e-5, atol=1e-5)
