"""Batched sampling chooses what each row alone would choose, and what the slow reference chooses."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core import SamplingParams
from service.engine.sampling.likeliest import likeliest
from service.engine.sampling.sample import Chosen, sample
from service.engine.sampling.state import RowState
from tests.unit.engine.sampling_reference import ReferenceRow

VOCABULARIES = st.sampled_from([5, 70, 256, 1000, 9000])

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.sampled_from([0, 0, 2]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 1.0, 0.5, 0.95, 0.9999]),
    top_k=st.sampled_from([0, 0, 1, 40, 64, 65, 2000]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1e-4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    seed=st.integers(0, 2**40),
    logit_bias=st.sampled_from([(), (), ((1, 3.0), (4, -100.0))]),
    logprobs=st.sampled_from([None, None, 0, 3]),
)

ENDS = frozenset({0, 3})
PROMPT = (1, 2, 2, 4)


def _logits(seed: int, rows: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.5, 3.0, 8.0])[torch.randint(0, 3, (rows, 1), generator=generator)]
    return spread * torch.randn(rows, vocabulary, generator=generator)


@settings(deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=6), VOCABULARIES, st.integers(0, 2**31), st.booleans())
def test_every_row_gets_the_reference_tokens(params, vocabulary, seed, rounded):
    rows = [RowState.start(p, PROMPT, ENDS) for p in params]
    references = [ReferenceRow(p, PROMPT, ENDS) for p in params]
    for step in range(2):
        logits = _logits(seed + step, len(rows), vocabulary)
        # bfloat16 logits are full of ties.
        logits = logits.bfloat16() if rounded else logits
        chosen = sample(logits, rows)
        for row, reference, choice, line in zip(rows, references, chosen, logits, strict=True):
            assert isinstance(choice, Chosen)
            assert choice.token == reference.choose(line)
            row.record(choice.token)
            reference.record(choice.token)


@settings(deadline=None, max_examples=50)
@given(st.lists(PARAMS, min_size=2, max_size=6), VOCABULARIES, st.integers(0, 2**31), st.randoms())
def test_a_row_is_the_same_alone_and_in_any_batch(params, vocabulary, seed, shuffle):
    together = [RowState.start(p, PROMPT, ENDS) for p in params]
    alone = [RowState.start(p, PROMPT, ENDS) for p in params]
    for step in range(2):
        logits = _logits(seed + step, len(params), vocabulary)
        order = list(range(len(params)))
        shuffle.shuffle(order)
        chosen = sample(logits[order], [together[i] for i in order])
        for place, i in enumerate(order):
            choice = sample(logits[i : i + 1], [alone[i]])[0]
            assert chosen[place] == choice
            together[i].record(choice.token)
            alone[i].record(choice.token)


def test_more_rows_than_are_worked_on_together_keep_their_places(monkeypatch):
    # Row by row is for faults; it would hide one of the batch here.
    monkeypatch.setattr("service.engine.sampling.sample._alone", None)
    vocabulary = 1 << 16
    params = [
        SamplingParams(
            max_tokens=9, temperature=[0.0, 0.7][i % 2], seed=i, logprobs=1, presence_penalty=i % 3
        )
        for i in range(40)
    ]
    rows = [RowState.start(p, (), frozenset()) for p in params]
    logits = _logits(3, 40, vocabulary)
    for row, reference, choice, line in zip(
        rows, [ReferenceRow(p) for p in params], sample(logits, rows), logits, strict=True
    ):
        assert choice.token == reference.choose(line)
        assert choice.logprobs.token == choice.token
        assert choice.logprobs.top[0][0] == int(line.argmax())
        row.record(choice.token)


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 63, 500, 8192, 20_000]),
    st.sampled_from([1, 20, 64, 1024]),
    st.integers(0, 2**31),
    st.sampled_from([1, 5, 10**6]),
)
def test_the_likeliest_are_those_of_a_stable_sort(rows, size, count, seed, distinct):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-distinct, distinct, (rows, size), generator=generator) / distinct
    values[:, ::7] = float("-inf")
    count = min(count, size)
    expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(likeliest(values, count), expected)
