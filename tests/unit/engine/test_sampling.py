"""Every row is sampled by its own parameters, and its own random stream."""

import math

import pytest
import torch

from service.core import SamplingParams
from service.engine.sampling.sample import Chosen, sample
from service.engine.sampling.state import NotFiniteError, RowState


def _row(prompt=(), ends=frozenset(), processors=(), **params) -> RowState:
    return RowState.start(
        SamplingParams(max_tokens=100, **{"temperature": 1.0, "seed": 0} | params), prompt, ends, processors
    )


def _tokens(logits, rows) -> list[int]:
    chosen = sample(logits, rows)
    assert all(isinstance(choice, Chosen) for choice in chosen), chosen
    return [choice.token for choice in chosen]


def _draws(logits, count=400, **params) -> list[int]:
    row = _row(**params)
    draws = []
    for _ in range(count):
        draws += _tokens(logits[None], [row])
        row.record(draws[-1])
    return draws


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def test_greedy_takes_the_largest_logit():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert _tokens(logits, [_row(temperature=0), _row(temperature=0)]) == [1, 0]


@pytest.mark.parametrize("vocabulary", [7, 256, 1024, 1000])
def test_greedy_takes_the_first_of_equal_logits(vocabulary):
    logits = torch.zeros(3, vocabulary, dtype=torch.bfloat16)
    logits[1, vocabulary // 2 :] = 1.0
    logits[2, -1] = 1.0
    rows = [_row(temperature=0) for _ in range(3)]
    assert _tokens(logits, rows) == [0, vocabulary // 2, vocabulary - 1]


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
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),
    ],
)
def test_cuts_keep_exactly_the_tokens_they_should(params, allowed):
    assert set(_draws(LOGITS, **params)) == allowed


def test_top_p_looks_beyond_the_short_head_when_the_distribution_is_flat():
    flat = torch.zeros(5000)
    assert len(set(_draws(flat, 900, top_p=0.99))) > 700


def test_top_p_is_a_share_of_the_whole_distribution_however_little_of_it_is_looked_at():
    # The first 64 hold 0.96, the nucleus of 0.95 ends at the 64th: not at 0.95 × 0.96.
    probabilities = torch.cat([torch.full((64,), 0.96 / 64), torch.full((20_000,), 0.04 / 20_000)])
    assert set(_draws(probabilities.log(), 2500, top_p=0.95)) == set(range(64))


def test_equal_probabilities_are_cut_by_id():
    assert set(_draws(torch.zeros(9000), 300, top_k=3)) == {0, 1, 2}


def test_unseeded_rows_differ():
    assert _draws(torch.zeros(1000), 20, seed=None) != _draws(torch.zeros(1000), 20, seed=None)


def test_a_choice_comes_again_until_it_is_recorded():
    row = _row()
    first = [_tokens(torch.zeros(1, 10_000), [row]) for _ in range(3)]
    assert first[0] == first[1] == first[2]
    row.record(first[0][0])
    assert _tokens(torch.zeros(1, 10_000), [row]) != first[0]


def test_repetition_penalty_covers_prompt_and_generated_tokens_of_either_sign():
    row = _row(prompt=(0, 0), temperature=0, repetition_penalty=2.0)
    assert _tokens(torch.tensor([[1.5, 1.0, -1.0]]), [row]) == [1]
    row.record(1)
    assert _tokens(torch.tensor([[1.5, 1.0, 0.8]]), [row]) == [2]
    assert _tokens(torch.tensor([[-0.5, -0.6, -0.9]]), [row]) == [2]


def test_frequency_penalty_counts_and_presence_penalty_does_not():
    logits = torch.tensor([[2.0, 1.0]])
    often = _row(temperature=0, frequency_penalty=0.6)
    once = _row(temperature=0, presence_penalty=0.6)
    for row in (often, once):
        row.record(0)
        assert _tokens(logits, [row]) == [0]
        row.record(0)
    assert _tokens(logits, [often]) == [1]
    assert _tokens(logits, [once]) == [0]


def test_penalties_ignore_the_prompt_but_for_repetition():
    row = _row(prompt=(0, 0, 0), temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    assert _tokens(torch.tensor([[2.0, 1.0]]), [row]) == [0]


def test_the_tally_of_a_long_text_grows():
    row = _row(temperature=0, frequency_penalty=1.0)
    for token in [*range(300), 7]:
        row.record(token)
    counts = dict(zip(row.tally.ids.tolist(), row.tally.counts.tolist(), strict=True))
    assert counts == {token: 2.0 if token == 7 else 1.0 for token in range(300)}


def test_logit_bias_comes_before_the_penalties_and_moves_only_its_tokens():
    row = _row(prompt=(0,), temperature=0, repetition_penalty=2.0, logit_bias=((0, 4.0),))
    # (1 + 4) / 2 = 2.5, where 1 / 2 + 4 would be 4.5.
    assert _tokens(torch.tensor([[1.0, 2.4]]), [row]) == [0]
    assert _tokens(torch.tensor([[1.0, 2.6]]), [row]) == [1]
    assert _tokens(torch.tensor([[0.0, 3.0, 2.0]]), [_row(temperature=0, logit_bias=((1, -100.0),))]) == [2]


def test_end_tokens_wait_for_the_minimum_length():
    row = _row(ends=frozenset({0}), temperature=0, min_tokens=1)
    logits = torch.tensor([[9.0, 1.0]])
    assert _tokens(logits, [row]) == [1]
    row.record(1)
    assert _tokens(logits, [row]) == [0]


def test_a_processor_sees_the_text_so_far_and_decides_last():
    seen = []

    def odd_only(generated_ids, logits):
        seen.append(list(generated_ids))
        assert logits.dtype == torch.float32
        logits[::2] = float("-inf")
        return logits

    row = _row(temperature=0, processors=(odd_only,), logit_bias=((0, 50.0),))
    logits = torch.tensor([[9.0, 1.0, 5.0, 2.0]], dtype=torch.bfloat16)
    assert _tokens(logits, [row]) == [3]
    row.record(3)
    assert _tokens(logits, [row]) == [3]
    assert seen == [[], [3]]


def _raises(generated_ids, logits):
    raise KeyError("grammar")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"processors": (_raises,)}, KeyError),
        ({"processors": (lambda ids, logits: logits[:2],)}, ValueError),
        ({"logit_bias": ((3, 1.0),)}, ValueError),
        ({"logit_bias": ((-1, 1.0),)}, ValueError),
        ({"prompt": (7,), "repetition_penalty": 2.0}, ValueError),
        ({"ends": frozenset({0, 1, 2}), "min_tokens": 5}, NotFiniteError),
    ],
)
def test_a_row_at_fault_fails_alone(bad, error, temperature):
    logits = torch.tensor([[1.0, 5.0, 0.0]]).repeat(3, 1)
    good = {"temperature": temperature, "top_k": 1, "logit_bias": ((2, 50.0),)}
    first, broken, last = sample(
        logits, [_row(**good), _row(**{"temperature": temperature} | bad), _row(**good)]
    )
    assert isinstance(broken, error)
    assert [first.token, last.token] == [2, 2]


def test_a_fault_in_a_row_itself_is_found_row_by_row(monkeypatch):
    bad, good = _row(), _row(temperature=0)
    monkeypatch.setattr(RowState, "edits_logits", property(lambda self: 1 / 0 if self is bad else False))
    monkeypatch.setattr(RowState, "point", lambda self: 1 / 0)
    broken, chosen = sample(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), [bad, good])
    assert isinstance(broken, ZeroDivisionError)
    assert chosen.token == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("vocabulary", [3, 512])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"top_p": 0.9},
        {"temperature": 0, "min_tokens": 1},
        {"min_tokens": 1, "top_k": 2},
    ],
)
def test_broken_logits_fail_their_row_alone(bad, vocabulary, params):
    logits = torch.zeros(3, vocabulary)
    logits[0, 1] = bad
    logits[1:, 2] = 50.0
    # Forbidding the broken token does not hide it.
    rows = [_row(ends=frozenset({1}), **params) for _ in range(2)]
    chosen = sample(logits, [*rows, _row(temperature=0)])
    assert isinstance(chosen[0], NotFiniteError)
    assert [choice.token for choice in chosen[1:]] == [2, 2]


@pytest.mark.parametrize("params", [{"temperature": 1e-310}, {"repetition_penalty": 1e-300}])
def test_parameters_that_overflow_fail_the_row_instead_of_choosing_some_token(params):
    row = _row(prompt=(0, 1), **params)
    assert isinstance(sample(torch.tensor([[2.0, 5.0, -1.0]]), [row])[0], NotFiniteError)


def test_logits_are_not_changed():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([[1.0, 2.0, 3.0]] * 3, dtype=dtype)
        before = logits.clone()
        edited = {"prompt": (2,), "repetition_penalty": 3.0, "min_tokens": 2, "ends": frozenset({1})}
        sample(logits, [_row(temperature=0, **edited), _row(temperature=0.5, **edited), _row(logprobs=2)])
        assert torch.equal(logits, before)


def test_rows_and_logits_must_match():
    with pytest.raises(ValueError, match="2 rows of logits for 1 rows"):
        sample(torch.zeros(2, 3), [_row()])
