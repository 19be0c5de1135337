"""What sampling means, for one row and as slowly and plainly as it can be said: the oracle of the tests.

The first version of the server's sampler, with two differences: a whole vocabulary is sorted, equal
probabilities by id, so that nothing depends on how much of it was looked at; and sums are float64.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from service.core import SamplingParams


class ReferenceRow:
    """One row: `choose` a token, then `record` it."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int] = (), ends: frozenset[int] = frozenset()
    ):
        self.params = params
        self.prompt = set(prompt)
        self.ends = ends
        self.stream = random.Random(params.seed)
        self.tokens: list[int] = []

    def record(self, token: int) -> None:
        self.tokens.append(token)

    def choose(self, logits: Tensor) -> int:
        """`logits` (vocabulary,)."""
        params = self.params
        logits = self._edited(logits.to(torch.float32).clone())
        if params.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / params.temperature, dim=-1)
        if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
            return self._draw(probabilities)
        values, ids = probabilities.sort(descending=True, stable=True)
        keep = torch.ones_like(values, dtype=torch.bool)
        if params.top_k:
            keep[params.top_k :] = False
        if params.min_p:
            keep &= values >= params.min_p * values[0]
        if params.top_p < 1.0:
            kept = (values * keep).to(torch.float64)
            mass = kept.sum() if params.top_k or params.min_p else 1.0
            keep &= kept.cumsum(-1) - kept < params.top_p * mass
        keep[0] = True
        return int(ids[self._draw(values * keep)])

    def _draw(self, weights: Tensor) -> int:
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        point = self.stream.random() * float(cumulative[-1])
        return min(int(torch.searchsorted(cumulative, point, right=True)), len(weights) - 1)

    def _edited(self, logits: Tensor) -> Tensor:
        params = self.params
        for token, addition in params.logit_bias:
            logits[token] += addition
        seen = self.prompt | set(self.tokens)
        if params.repetition_penalty != 1.0:
            for token in seen:
                value = logits[token]
                logits[token] = (
                    value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
                )
        for token in set(self.tokens):
            count = torch.tensor(float(self.tokens.count(token)))
            logits[token] -= count * params.frequency_penalty + params.presence_penalty
        if len(self.tokens) < params.min_tokens:
            logits[sorted(self.ends)] = float("-inf")
        return logits
