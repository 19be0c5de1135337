"""Tokens that a request may not have: everything outside its list, and the last token of its bad words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from service.core import SamplingParams
from service.engine.sampling.state import LogitsProcessor


def restrictions(params: SamplingParams) -> tuple[LogitsProcessor, ...]:
    """What a request's parameters forbid; nothing for most."""
    if params.allowed_token_ids is None and not params.bad_words:
        return ()
    return (Restriction(params.allowed_token_ids, params.bad_words),)


class Restriction:
    """Forbids tokens of one row.

    Args:
        allowed: only these may be chosen; None allows all.
        bad_words: token sequences, none empty; the last token of one must not follow the others.
    """

    def __init__(self, allowed: Sequence[int] | None, bad_words: Sequence[tuple[int, ...]]) -> None:
        self._allowed = None if allowed is None else torch.tensor(sorted(set(allowed)), dtype=torch.int64)
        self._bad_words = tuple(bad_words)

    def __call__(self, generated_ids: Sequence[int], logits: Tensor) -> Tensor:
        """The logits with minus infinity where nothing may be chosen."""
        if self._allowed is not None:
            self._allowed = self._allowed.to(logits.device)
            kept = logits[self._allowed]
            logits.fill_(-torch.inf)
            logits[self._allowed] = kept
        banned = [word[-1] for word in self._bad_words if _ends_with(generated_ids, word[:-1])]
        if banned:
            logits[banned] = -torch.inf
        return logits


def _ends_with(tokens: Sequence[int], end: tuple[int, ...]) -> bool:
    return len(tokens) >= len(end) and tuple(tokens[len(tokens) - len(end) :]) == end
