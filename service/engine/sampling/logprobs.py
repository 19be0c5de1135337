"""Log-probabilities of the model's own distribution: before bias, penalties, temperature and cuts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from service.core import TokenLogprobs
from service.engine.sampling.likeliest import likeliest
from service.engine.sampling.matrix import spans
from service.engine.sampling.state import NotFiniteError


def prompt_logprobs(logits: Tensor, targets: Sequence[int], count: int) -> tuple[TokenLogprobs, ...]:
    """What the model thought of given tokens.

    Args:
        logits: (n, vocabulary) of any floating dtype, row i the distribution of `targets[i]`; not changed.
        targets: n token ids.
        count: how many of the likeliest tokens to report beside each target.

    Raises:
        NotFiniteError: a row holds NaN or infinity.
    """
    if len(logits) != len(targets):
        raise ValueError(f"{len(logits)} rows of logits for {len(targets)} target tokens")
    return tuple(token_logprobs(logits, targets, [count] * len(targets)))


def token_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """The same for rows that each have their own count of likeliest tokens."""
    found: list[TokenLogprobs] = []
    for span in spans(len(tokens), logits):
        found += _reports(logits[span].to(torch.float32), tokens[span], counts[span])
    return found


def _reports(raw: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    distribution = torch.log_softmax(raw, dim=-1)
    # One infinite or NaN logit makes its whole row NaN.
    if not bool(torch.isfinite(distribution.amax(dim=-1)).all()):
        raise NotFiniteError("the model gave NaN or infinite logits")
    chosen = torch.tensor(tokens, device=raw.device)[:, None]
    values = distribution.gather(-1, chosen)[:, 0].tolist()
    ranks = (torch.count_nonzero(raw > raw.gather(-1, chosen), dim=-1) + 1).tolist()
    ids = likeliest(raw, min(max(counts, default=0), raw.shape[-1]))
    tops = distribution.gather(-1, ids).tolist()
    return [
        TokenLogprobs(token, value, rank, tuple(zip(best[:count], top[:count], strict=True)))
        for token, value, rank, count, best, top in zip(
            tokens, values, ranks, counts, ids.tolist(), tops, strict=True
        )
    ]
