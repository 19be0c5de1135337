"""Tokens that a grammar allows: the last edit of a row's logits, and the row's way through the grammar."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.core import GenerationRequest
from service.errors import RequestFailedError
from service.grammar import Grammar, Run


def run_of(request: GenerationRequest) -> Run | None:
    """The start of a request's way through its grammar; None where the answer is free.

    Raises:
        RequestFailedError: it has a constraint that nobody compiled; it must not be ignored.
    """
    constraint = request.sampling.constraint
    if constraint is None:
        return None
    if not isinstance(request.grammar, Grammar):
        raise RequestFailedError("the request's constraint was not compiled")
    return Run(request.grammar, constraint.param)


class Constrain:
    """Leaves the tokens that the grammar allows.

    An end-of-sequence token is left out for as long as the request wants a longer answer and the grammar has
    one; where the grammar has nothing else, it comes whatever the request and other edits say.

    Args:
        run: advanced elsewhere, once for each recorded token.
        min_tokens: of the request.
        ignore_eos: of the request.
    """

    def __init__(self, run: Run, *, min_tokens: int, ignore_eos: bool) -> None:
        self._run = run
        self._ends = np.asarray(run.ends, dtype=np.int64)
        self._min_tokens = min_tokens
        self._ignore_eos = ignore_eos

    def __call__(self, generated_ids: Sequence[int], logits: Tensor) -> Tensor:
        """The logits with minus infinity where the grammar does not go."""
        allowed = self._run.allowed()
        size = logits.shape[-1]
        ends = self._ends[allowed[self._ends]]
        if ends.size:
            longer = allowed.copy()
            longer[ends] = False
            if not longer[:size].any():
                logits.fill_(-torch.inf)
                logits[torch.from_numpy(ends[ends < size]).to(logits.device)] = 0.0
                return logits
            if self._ignore_eos or len(generated_ids) < self._min_tokens:
                allowed = longer
        forbidden = torch.from_numpy(~allowed[:size]).to(logits.device)
        return logits.masked_fill_(forbidden, -torch.inf)
