"""Every row is sampled by its own parameters, and its own random stream."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.core import SamplingParams
from service.engine.sampler import NotFiniteError, RowState, sample


def _row(prompt=(), ends=frozenset(), **params) -> RowState:
    return RowState.start(
        SamplingParams(max_tokens=100, **{"temperature": 1.0, "seed": 0} | params), prompt, ends
    )


def _draws(logits, count=400, **params) -> list[int]:
    row = _row(**params)
    return [sample(logits[None], [row])[0] for _ in range(count)]


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def test_greedy_takes_the_largest_logit():
    assert sample(
        torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]]), [_row(temperature=0), _row(temperature=0)]
    ) == [1, 0]


def test_draws_follow_the_distribution():
    draws = _draws(LOGITS, 4000)
    for token, probability in enumerate([0.5, 0.3, 0.15, 0.05]):
        share = draws.count(token) / 4000
        assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000)


def test_temperature_flattens_and_sharpens():
    assert _draws(LOGITS, temperature=0.1).count(0) > 390
    assert _draws(LOGITS, temperature=20.0).count(3) > 60


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.2}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "min_p": 0.5}, {0, 1}),
        ({"top_k": 3, "top_p": 0.99}, {0, 1, 2}),
    ],
)
def test_cuts_keep_exactly_the_tokens_they_should(params, allowed):
    assert set(_draws(LOGITS, **params)) == allowed


def test_top_p_looks_beyond_the_short_head_when_the_distribution_is_flat():
    flat = torch.zeros(5000)
    assert len(set(_draws(flat, 900, top_p=0.99))) > 700


@given(seed=st.integers(0, 2**32), position=st.integers(0, 4), batch=st.integers(1, 5))
def test_a_seeded_row_draws_the_same_whatever_is_in_the_batch(seed, position, batch):
    position %= batch
    generator = torch.Generator().manual_seed(7)
    alone, among = _row(seed=seed, top_p=0.9), _row(seed=seed, top_p=0.9)
    others = [_row(seed=i) for i in range(batch)]
    for _ in range(5):
        logits = torch.randn(batch, 50, generator=generator)
        rows = [among if i == position else others[i] for i in range(batch)]
        assert sample(logits, rows)[position] == sample(logits[position][None], [alone])[0]


def test_unseeded_rows_differ():
    assert _draws(torch.zeros(1000), 20, seed=None) != _draws(torch.zeros(1000), 20, seed=None)


def test_repetition_penalty_covers_prompt_and_generated_tokens_of_either_sign():
    row = _row(prompt=(0,), temperature=0, repetition_penalty=2.0)
    logits = torch.tensor([[1.5, 1.0, -1.0]])
    assert sample(logits, [row]) == [1]
    row.record(1)
    assert sample(torch.tensor([[1.5, 1.0, 0.8]]), [row]) == [2]
    assert sample(torch.tensor([[-0.5, -0.6, -0.9]]), [row]) == [2]


def test_frequency_penalty_counts_and_presence_penalty_does_not():
    logits = torch.tensor([[2.0, 1.0]])
    often = _row(temperature=0, frequency_penalty=0.6)
    once = _row(temperature=0, presence_penalty=0.6)
    for row in (often, once):
        row.record(0)
        assert sample(logits, [row]) == [0]
        row.record(0)
    assert sample(logits, [often]) == [1]
    assert sample(logits, [once]) == [0]


def test_penalties_ignore_the_prompt_but_for_repetition():
    row = _row(prompt=(0, 0, 0), temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    assert sample(torch.tensor([[2.0, 1.0]]), [row]) == [0]


def test_end_tokens_wait_for_the_minimum_length():
    row = _row(ends=frozenset({0}), temperature=0, min_tokens=1)
    logits = torch.tensor([[9.0, 1.0]])
    assert sample(logits, [row]) == [1]
    row.record(1)
    assert sample(logits, [row]) == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_fail_their_row_alone(bad, temperature):
    logits = torch.tensor([[1.0, bad, 0.0], [1.0, 5.0, 0.0]])
    chosen = sample(logits, [_row(temperature=temperature), _row(temperature=0)])
    assert isinstance(chosen[0], NotFiniteError)
    assert chosen[1] == 1


@pytest.mark.parametrize("params", [{"temperature": 1e-310}, {"repetition_penalty": 1e-300}])
def test_parameters_that_overflow_fail_the_row_instead_of_choosing_some_token(params):
    row = _row(prompt=(0, 1), **params)
    assert isinstance(sample(torch.tensor([[2.0, 5.0, -1.0]]), [row])[0], NotFiniteError)


def test_logits_are_not_changed():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    before = logits.clone()
    sample(
        logits, [_row(prompt=(2,), temperature=0, repetition_penalty=3.0, min_tokens=2, ends=frozenset({1}))]
    )
    assert torch.equal(logits, before)
