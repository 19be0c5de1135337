"""Logits → one token for each row, every row with its own parameters and its own random stream.

Order of operations as in vLLM: repetition, frequency and presence penalties, then forbidden tokens, then
temperature, min_p, top_k, top_p. A draw is the inverse of the cumulative distribution at one uniform
number of the row's own stream, so a seeded row gives the same tokens whatever else is in the batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.core import SamplingParams

_HEAD = 512
"""Tokens looked at before a whole vocabulary is sorted."""


@dataclass(slots=True)
class RowState:
    """What sampling remembers of one row.

    Attributes:
        params: the request's parameters.
        ends: token ids that must not come before `min_tokens`.
        stream: the row's own random numbers.
        seen: prompt and generated token ids, for the repetition penalty.
        counts: generated token id → occurrences.
        generated: how many tokens were drawn.
    """

    params: SamplingParams
    ends: frozenset[int]
    stream: random.Random
    seen: set[int] = field(default_factory=set)
    counts: dict[int, int] = field(default_factory=dict)
    generated: int = 0

    @classmethod
    def start(cls, params: SamplingParams, prompt_ids: Sequence[int], ends: frozenset[int]) -> "RowState":
        """State before the first token; a seed of None draws a fresh one."""
        state = cls(params, ends, random.Random(params.seed))  # noqa: S311 sampling, not secrets
        if params.repetition_penalty != 1.0:
            state.seen.update(prompt_ids)
        return state

    def record(self, token: int) -> None:
        """Count a drawn token."""
        self.generated += 1
        if self.penalised:
            self.seen.add(token)
            self.counts[token] = self.counts.get(token, 0) + 1

    @property
    def penalised(self) -> bool:
        """Any penalty is on."""
        p = self.params
        return p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0

    @property
    def edits_logits(self) -> bool:
        """The row's logits change before the choice."""
        return self.penalised or (self.generated < self.params.min_tokens and bool(self.ends))


class NotFiniteError(RuntimeError):
    """A row's logits hold NaN or infinity where the choice would be made."""


def sample(logits: Tensor, rows: Sequence[RowState]) -> list[int | NotFiniteError]:
    """Choose a token for every row.

    Args:
        logits: (rows, vocabulary) of any floating dtype; not changed.

    Returns:
        For each row the token id, or the error if its logits are unusable; other rows are unaffected.
    """
    chosen: list[int | NotFiniteError] = []
    best, index = logits.max(dim=-1)
    finite = torch.isfinite(best).tolist()
    greedy = index.tolist()
    for row, state in enumerate(rows):
        if not finite[row]:
            chosen.append(NotFiniteError("the model gave NaN or infinite logits"))
        elif state.params.temperature == 0 and not state.edits_logits:
            chosen.append(int(greedy[row]))
        else:
            try:
                chosen.append(_choose(logits[row].to(torch.float32), state))
            except NotFiniteError as error:
                chosen.append(error)
    return chosen


def _choose(logits: Tensor, state: RowState) -> int:
    """One row, (vocabulary,) float32."""
    params = state.params
    if state.edits_logits:
        logits = _edited(logits.clone(), state)
    if params.temperature == 0:
        best = int(logits.argmax())
        _check(logits[best])
        return best
    probabilities = torch.softmax(logits / params.temperature, dim=-1)
    _check(probabilities.sum())
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        return _draw(probabilities, state)
    values, ids = _likeliest(probabilities, params)
    keep = torch.ones_like(values, dtype=torch.bool)
    if params.min_p:
        keep &= values >= params.min_p * values[0]
    if params.top_p < 1.0:
        values = values * keep / (values * keep).sum()
        keep &= values.cumsum(-1) - values < params.top_p
    keep[0] = True
    return int(ids[_draw(values * keep, state)])


def _likeliest(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that can survive the cuts, likeliest first: probabilities (k,) and ids (k,).

    Sorting a whole vocabulary costs milliseconds; nearly always a short head already holds the nucleus.
    """
    size = probabilities.shape[0]
    if params.top_k:
        return probabilities.topk(min(params.top_k, size))
    for head in (_HEAD, 8 * _HEAD):
        values, ids = probabilities.topk(min(head, size))
        whole_nucleus = float(values.sum()) >= params.top_p
        below_floor = float(values[-1]) < params.min_p * float(values[0])
        if head >= size or whole_nucleus or below_floor:
            return values, ids
    return probabilities.sort(descending=True)


def _check(value: Tensor) -> None:
    if not bool(torch.isfinite(value)):
        raise NotFiniteError("the row's logits are not finite after penalties and temperature")


def _draw(weights: Tensor, state: RowState) -> int:
    """Index drawn from non-negative (n,) weights; summed in float64, since float32 loses small ones."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    point = state.stream.random() * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, point, right=True))
    return min(index, weights.shape[0] - 1)


def _edited(logits: Tensor, state: RowState) -> Tensor:
    """Penalties and forbidden tokens, in place on one row."""
    params = state.params
    if params.repetition_penalty != 1.0 and state.seen:
        ids = torch.tensor(sorted(state.seen), device=logits.device)
        values = logits[ids]
        logits[ids] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if state.counts and (params.frequency_penalty or params.presence_penalty):
        ids = torch.tensor(list(state.counts), device=logits.device)
        counts = torch.tensor(list(state.counts.values()), dtype=torch.float32, device=logits.device)
        logits[ids] -= counts * params.frequency_penalty + params.presence_penalty
    if state.generated < params.min_tokens and state.ends:
        logits[torch.tensor(sorted(state.ends), device=logits.device)] = float("-inf")
    return logits
