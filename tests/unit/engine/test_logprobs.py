"""Log-probabilities are of the model's own distribution, and cost only the rows that ask."""

import math

import pytest
import torch

from service.core import SamplingParams
from service.engine.sampling import logprobs
from service.engine.sampling.logprobs import prompt_logprobs
from service.engine.sampling.sample import sample
from service.engine.sampling.state import NotFiniteError, RowState

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def _row(prompt=(), **params) -> RowState:
    return RowState.start(SamplingParams(max_tokens=9, **{"temperature": 0} | params), prompt, frozenset())


def test_a_row_that_asks_gets_its_token_and_the_likeliest():
    (chosen,) = sample(LOGITS + 7, [_row(logprobs=2)])
    found = chosen.logprobs
    assert (found.token, found.rank) == (0, 1)
    assert found.logprob == pytest.approx(math.log(0.5), abs=1e-6)
    assert [token for token, _ in found.top] == [0, 1]
    assert found.top[1][1] == pytest.approx(math.log(0.3), abs=1e-6)


def test_they_are_raw_whatever_changes_the_choice():
    row = _row(
        prompt=(0,), logprobs=4, temperature=3.0, top_k=1, repetition_penalty=3.0, logit_bias=((2, 9.0),)
    )
    found = sample(LOGITS, [row])[0].logprobs
    assert (found.token, found.rank) == (2, 3)
    assert found.logprob == pytest.approx(math.log(0.15), abs=1e-6)
    assert sum(math.exp(value) for _, value in found.top) == pytest.approx(1.0)


def test_rows_ask_for_different_numbers_or_none():
    logits = LOGITS.repeat(4, 1)
    logits[3] = torch.nan
    chosen = sample(logits, [_row(logprobs=0), _row(), _row(logprobs=20), _row(logprobs=1)])
    assert chosen[0].logprobs.top == ()
    assert chosen[1].logprobs is None
    assert len(chosen[2].logprobs.top) == 4
    assert isinstance(chosen[3], NotFiniteError)


def test_nothing_is_computed_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(logprobs, "_reports", None)
    assert sample(LOGITS, [_row()])[0].logprobs is None


def test_equal_tokens_share_a_rank_and_come_by_id():
    found = prompt_logprobs(torch.zeros(1, 1000, dtype=torch.bfloat16), [700], 3)[0]
    assert found.rank == 1
    assert [token for token, _ in found.top] == [0, 1, 2]


def test_a_long_prompt_in_pieces_is_what_it_is_in_one():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 1 << 16, generator=generator).bfloat16()
    targets = torch.randint(0, 1 << 16, (40,), generator=generator).tolist()
    found = prompt_logprobs(logits, targets, 5)
    expected = logits.float().log_softmax(-1)
    for line, target, position in zip(expected, targets, found, strict=True):
        assert position.token == target
        assert position.logprob == pytest.approx(float(line[target]), abs=1e-5)
        assert position.rank == int((line > line[target]).sum()) + 1
        assert [value for _, value in position.top] == pytest.approx(line.topk(5).values.tolist(), abs=1e-5)


def test_a_prompt_that_gave_nan_is_refused():
    logits = torch.zeros(2, 8)
    logits[1, 3] = math.nan
    with pytest.raises(NotFiniteError):
        prompt_logprobs(logits, [1, 2], 1)
    with pytest.raises(ValueError, match="2 rows of logits for 1 target"):
        prompt_logprobs(logits, [1], 1)
    assert prompt_logprobs(logits[:0], [], 1) == ()
