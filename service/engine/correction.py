"""Router features as exact weights would give them, read with rounded ones.

Rounding moves the features of all prompts much alike, mostly through the huge states of a prompt's first tokens:
by less than a hundredth of their length, but in a direction in which prompts of one task hardly differ, so that a
guard finds them all foreign. At the start the same neutral prompts are read with both sets of weights, and a ridge
regression from the rounded features to the move takes it back, whatever router was fitted on exact ones.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experts.errors import RoutingError
from experts.routing import neutral_prompts, render_prompts
from service.core import Pattern
from service.engine.layout import PackLayout, Segment
from service.engine.model import Batch, Forward, SharedModel
from service.native.decoder import SHARED_BASE
from service.native.memory import page_out

_log = logging.getLogger(__name__)

PROMPTS = 32
"""Neutral prompts, each in every form, that the move is learnt from."""
_RIDGE = 0.1
"""Of the rows' mean squared distance from their centre."""
_AT_ONCE = 16
_EXACT_BASE = SHARED_BASE + 1


@dataclass(frozen=True, slots=True)
class Move:
    """What rounding does to one layer's features x of width w: x − centre times rows, times weights, and constant.

    Attributes:
        centre, constant: (w,).
        rows, weights: (prompts, w).
    """

    centre: Tensor
    rows: Tensor
    weights: Tensor
    constant: Tensor

    @classmethod
    def learnt(cls, exact: Tensor, rounded: Tensor) -> "Move":
        """From features (n, w) of the same prompts."""
        centre, moves = rounded.mean(0), rounded - exact
        rows = rounded - centre
        gram = (rows @ rows.T).double()
        penalty = _RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        constant = moves.mean(0)
        weights = torch.linalg.solve(
            gram + penalty * torch.eye(len(rows), dtype=gram.dtype), (moves - constant).double()
        )
        return cls(centre, rows, weights.float(), constant)

    def undone(self, features: Tensor) -> Tensor:
        """(n, w) → (n, w)."""
        return features - self.constant - ((features - self.centre) @ self.rows.T) @ self.weights


@dataclass(frozen=True, slots=True)
class Correction:
    """Takes back what rounding did to the features of every layer that the router reads, lowest first."""

    moves: tuple[Move, ...]

    @classmethod
    def learnt(cls, exact: Tensor, rounded: Tensor, layers: int) -> "Correction":
        """From features (n, layers · w) of the same prompts by exact and by rounded weights."""
        pairs = zip(exact.chunk(layers, 1), rounded.chunk(layers, 1), strict=True)
        return cls(tuple(Move.learnt(*pair) for pair in pairs))

    def __call__(self, features: Tensor) -> Tensor:
        """(n, k · w) or (k · w,) features of the lowest k layers → the same, corrected."""
        rows = features if features.dim() == 2 else features[None]
        layers = rows.shape[1] // self.moves[0].centre.shape[0]
        parts = zip(self.moves, rows.chunk(layers, 1), strict=False)
        corrected = torch.cat([move.undone(part) for move, part in parts], dim=1)
        return corrected if features.dim() == 2 else corrected[0]

    def forward(self, model: SharedModel, batch: Batch) -> Forward:
        """`model.forward(batch)`, whoever is told features in or after it being told corrected ones."""
        settle, decide = batch.settle, batch.decide
        if settle is not None:
            batch.settle = lambda features: settle(self(features))
        if decide is not None:
            batch.decide = lambda index, features: decide(index, self(features))
        found = model.forward(batch)
        return found if found.features is None else replace(found, features=self(found.features))


@torch.inference_mode()
def learn_correction(model: SharedModel, tokenizer: Any) -> Correction | None:
    """Of a model whose compiled layers hold rounded weights; None where nothing is rounded or no router reads.

    The exact weights lie in memory once more meanwhile.
    """
    native, spec = model.native, model.spec
    if native is None or spec is None or not model.options.int8:
        return None
    try:
        prompts = render_prompts(tokenizer, neutral_prompts(tokenizer, PROMPTS))
    except RoutingError as error:
        _log.warning("router features stay as rounded weights give them: %s", error)
        return None
    ids = [list(spec.cut(prompt)) for prompt in prompts]
    rounded = _features(model, ids, SHARED_BASE)
    own = native.parts.modules
    native.install(_EXACT_BASE, native.prepare(lambda name: own[name].weight))
    try:
        exact = _features(model, ids, _EXACT_BASE)
    finally:
        native.drop_base(_EXACT_BASE)
        page_out(model.model.parameters())
    return Correction.learnt(exact, rounded, spec.parts)


def _features(model: SharedModel, prompts: Sequence[Sequence[int]], base: int) -> Tensor:
    """(prompts, d) float32 of the shared expert under one of the weight sets."""
    found = []
    for first in range(0, len(prompts), _AT_ONCE):
        batch = Batch(base=base)
        segments = []
        for ids in prompts[first : first + _AT_ONCE]:
            begin = len(batch.tokens)
            batch.tokens.extend(ids)
            batch.positions.extend(range(len(ids)))
            batch.counts.append(len(ids))
            batch.keeps.append(0)
            batch.patterns.append(Pattern())
            batch.lower.append(Pattern())
            segments.append(Segment(begin, len(batch.tokens)))
        batch.layout = PackLayout(segments=tuple(segments))
        features = model.forward(batch).features
        assert features is not None, "segments are read for a router"
        found.append(features)
    return torch.cat(found)
