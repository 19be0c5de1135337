"""Choose a token for every row of a step, each by its own parameters and its own random stream.

Order of operations, as in vLLM but for the bias: logit_bias, repetition, frequency and presence penalties,
forbidden tokens, processors, temperature, min_p, top_k, top_p. Rows are grouped by what they need, and a
group is one matrix; a greedy row without edits costs its share of one maximum and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.core import TokenLogprobs
from service.engine.sampling.draw import draw
from service.engine.sampling.edits import edit
from service.engine.sampling.likeliest import best
from service.engine.sampling.logprobs import token_logprobs
from service.engine.sampling.matrix import spans, taken
from service.engine.sampling.state import NotFiniteError, RowState


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's token, with its log-probabilities where the row asked for them."""

    token: int
    logprobs: TokenLogprobs | None = None


def sample(logits: Tensor, rows: Sequence[RowState]) -> list[Chosen | Exception]:
    """Choose a token for every row. Records nothing: until `RowState.record`, the same choice comes again.

    Args:
        logits: (rows, vocabulary) of any floating dtype; not changed.

    Returns:
        For each row its token, or why it has none; other rows are unaffected.
    """
    if len(logits) != len(rows):
        raise ValueError(f"{len(logits)} rows of logits for {len(rows)} rows")
    try:
        return _together(logits, rows)
    except Exception:  # noqa: BLE001 found again below, row by row
        return [_alone(logits[row : row + 1], state) for row, state in enumerate(rows)]


def _alone(logits: Tensor, state: RowState) -> Chosen | Exception:
    try:
        return _together(logits, [state])[0]
    except Exception as error:  # noqa: BLE001 belongs to this row alone
        return error


def _together(logits: Tensor, rows: Sequence[RowState]) -> list[Chosen | Exception]:
    plain: list[int] = []
    greedy: list[int] = []
    drawn: list[int] = []
    for row, state in enumerate(rows):
        if state.params.temperature > 0:
            drawn.append(row)
        elif state.edits_logits:
            greedy.append(row)
        else:
            plain.append(row)
    chosen: dict[int, int | Exception] = {}
    if plain:
        chosen.update(zip(plain, _largest(taken(logits, plain)), strict=True))
    for members, method in ((greedy, lambda work, _: _largest(work)), (drawn, draw)):
        for span in spans(len(members), logits):
            part = members[span]
            states = [rows[row] for row in part]
            work = taken(logits, part).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            errors = edit(work, states) if any(state.edits_logits for state in states) else {}
            for place, (row, token) in enumerate(zip(part, method(work, states), strict=True)):
                chosen[row] = errors.get(place, token)
    return _reported(logits, rows, [chosen[row] for row in range(len(rows))])


def _largest(logits: Tensor) -> list[int | Exception]:
    values, ids = best(logits)
    return [
        token if finite else NotFiniteError("the row's logits are NaN, infinite, or all forbidden")
        for token, finite in zip(ids.tolist(), torch.isfinite(values).tolist(), strict=True)
    ]


def _reported(
    logits: Tensor, rows: Sequence[RowState], chosen: Sequence[int | Exception]
) -> list[Chosen | Exception]:
    """Add log-probabilities where a row asked for them."""
    asked: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    for row, (state, token) in enumerate(zip(rows, chosen, strict=True)):
        if state.params.logprobs is not None and not isinstance(token, Exception):
            asked.append(row)
            tokens.append(token)
            counts.append(state.params.logprobs)
    reports = (
        dict(zip(asked, token_logprobs(taken(logits, asked), tokens, counts), strict=True)) if asked else {}
    )
    return [
        token if isinstance(token, Exception) else Chosen(token, reports.get(row))
        for row, token in enumerate(chosen)
    ]
