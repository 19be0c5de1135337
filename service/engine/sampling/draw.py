"""One token for every row of a matrix of logits: temperature, min_p, top_k, top_p, then a draw.

A draw is the inverse of the cumulative distribution at one uniform number of the row's own stream, so a
seeded row gives the same tokens whatever else is in the batch. Every cut keeps a prefix of the tokens in
order of probability, so that a short head of them nearly always decides; cumulative sums are float64, since
float32 loses the small ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from service.core import SamplingParams
from service.engine.sampling.likeliest import likeliest
from service.engine.sampling.matrix import taken
from service.engine.sampling.state import NotFiniteError, RowState

_HEADS = (64, 1024, 16384)
"""Likeliest tokens looked at, one after the other, before a whole vocabulary is sorted."""

_BLOCK = 64
"""Tokens summed at once where a row draws from its whole vocabulary."""


def draw(logits: Tensor, rows: Sequence[RowState]) -> list[int | Exception]:
    """Draw a token for every row; all have a temperature above 0.

    Args:
        logits: (rows, vocabulary) float32; overwritten.
    """
    temperatures = [state.params.temperature for state in rows]
    if any(temperature != 1.0 for temperature in temperatures):
        logits.div_(torch.tensor(temperatures, dtype=torch.float32, device=logits.device)[:, None])
    probabilities = torch.softmax(logits, dim=-1)
    # One infinite or NaN logit makes its whole row NaN.
    finite = torch.isfinite(probabilities[:, 0]).tolist()
    whole = [row for row, state in enumerate(rows) if finite[row] and not _cuts(state.params)]
    cut = [row for row, state in enumerate(rows) if finite[row] and _cuts(state.params)]
    chosen: list[int | Exception] = [
        NotFiniteError("the row's logits are not finite after penalties and temperature") for _ in rows
    ]
    for members, method in ((whole, _draw_whole), (cut, _draw_cut)):
        if members:
            states = [rows[row] for row in members]
            for row, token in zip(members, method(taken(probabilities, members), states), strict=True):
                chosen[row] = token
    return chosen


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _draw_whole(probabilities: Tensor, rows: Sequence[RowState]) -> list[int]:
    """From the whole vocabulary in order of ids: the block first, then the token in it."""
    size = probabilities.shape[-1]
    padding = -size % _BLOCK
    padded = functional.pad(probabilities, (0, padding)) if padding else probabilities
    blocks = padded.reshape(len(rows), -1, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    point = _points(probabilities, rows) * sums[:, -1:]
    block = torch.searchsorted(sums, point, right=True).clamp(max=sums.shape[-1] - 1)
    before = functional.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(len(rows), device=blocks.device), block[:, 0]]
    cumulative = before + inside.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=_BLOCK - 1)
    tokens: list[int] = (block * _BLOCK + index).clamp(max=size - 1)[:, 0].tolist()
    return tokens


def _draw_cut(probabilities: Tensor, rows: Sequence[RowState]) -> list[int]:
    """From the tokens that survive every row's cuts, likeliest first."""
    size = probabilities.shape[-1]
    chosen = [0] * len(rows)
    pending = list(range(len(rows)))
    for head in (*(head for head in _HEADS if head < size), size):
        states = [rows[row] for row in pending]
        tokens, decided = _draw_head(taken(probabilities, pending), states, head)
        for row, token, sure in zip(pending, tokens, decided, strict=True):
            if sure:
                chosen[row] = token
        pending = [row for row, sure in zip(pending, decided, strict=True) if not sure]
        if not pending:
            break
    return chosen


def _draw_head(probabilities: Tensor, rows: Sequence[RowState], head: int) -> tuple[list[int], list[bool]]:
    """Tokens drawn by looking at the `head` likeliest, and whether those were enough to decide."""
    device, size = probabilities.device, probabilities.shape[-1]
    ids = likeliest(probabilities, head)
    values = probabilities.gather(-1, ids)
    cumulative = values.cumsum(dim=-1, dtype=torch.float64)

    params = [state.params for state in rows]
    top_k = torch.tensor([min(p.top_k or size, size) for p in params], device=device)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)

    above = (values >= (min_p * values[:, 0])[:, None]).sum(dim=-1)
    limit = torch.minimum(top_k, above).clamp(min=1)
    # The nucleus is a share of what top_k and min_p leave, so their end must be in sight.
    free = (top_k == size) & (min_p == 0)
    mass = torch.where(free, 1.0, cumulative.gather(-1, limit[:, None] - 1)[:, 0])
    nucleus = torch.where(top_p < 1, top_p * mass, torch.inf)[:, None]
    inside = (cumulative - values < nucleus).sum(dim=-1)
    kept = torch.minimum(limit, inside).clamp(min=1)[:, None]

    ended = torch.where(free, cumulative[:, -1] >= nucleus[:, 0], (top_k <= head) | (above < head))
    decided: list[bool] = (ended | (head == size)).tolist()
    point = _points(probabilities, rows) * cumulative.gather(-1, kept - 1)
    index = torch.minimum(torch.searchsorted(cumulative, point, right=True), kept - 1)
    tokens: list[int] = ids.gather(-1, index)[:, 0].tolist()
    return tokens, decided


def _points(like: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Every row's uniform number, (rows, 1) float64."""
    points = [[state.point()] for state in rows]
    return torch.tensor(points, dtype=torch.float64, device=like.device)
