"""Promises of measuring: pristine weights, answers in question order."""

from typing import Any

import pytest
import torch

from experts.evaluation.generation import plain_generator
from experts.evaluation.task import Question, Task, measure
from experts.evaluation.weights import PatchedModel
from experts.factors import LowRank


def test_a_patched_model_comes_back_bit_by_bit() -> None:
    model = torch.nn.Linear(6, 4, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    patched = PatchedModel(model)
    change = LowRank(torch.randn(4, 2), torch.randn(2, 6))
    patched.apply([("weight", change), ("bias", None)])
    assert torch.equal(model.weight, (before.float() + change.dense()).bfloat16())
    patched.apply([])
    assert torch.equal(model.weight, before)


def test_each_application_starts_from_the_pristine_weights() -> None:
    model = torch.nn.Linear(6, 4)
    patched = PatchedModel(model)
    patched.apply([("weight", torch.ones(4, 6))])
    once = model.weight.detach().clone()
    patched.apply([("weight", torch.ones(4, 6))])
    assert torch.equal(model.weight, once)


class Letters:
    """A tokenizer of one token a character."""

    pad_token_id = 0
    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(i) for i in row if i > 1) for row in ids.tolist()]


class RepeatsTheLastToken:
    """A model that needs left padding: it answers with its last input token."""

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, input_ids[:, -1:].expand(-1, max_new_tokens)], dim=1)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_answers_come_back_in_the_order_of_the_questions(batch: int) -> None:
    generate = plain_generator(RepeatsTheLastToken(), Letters(), batch)
    assert generate(["long a", "b", "mid c"], 2) == ["aa", "bb", "cc"]


def test_measuring_scores_the_questions_given() -> None:
    task = Task("t", "exact", 1, (), (Question("x", "x"), Question("y", "z")))
    assert measure(lambda texts, limit: list(texts), task, task.test).mean == 0.5
