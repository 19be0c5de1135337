"""What sampling remembers of one row between steps, all of it on the host."""

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.core import SamplingParams
from service.grammar import Run


class NotFiniteError(RuntimeError):
    """A row's logits hold NaN or infinity where the choice would be made."""


class LogitsProcessor(Protocol):
    """Changes one row's logits before the choice, as a grammar does.

    Called with the token ids generated so far and the row's (vocabulary,) float32 logits, which it may
    change in place; returns logits of that shape. What it raises ends this row alone.
    """

    def __call__(self, generated_ids: Sequence[int], logits: Tensor) -> Tensor:
        """The logits to choose from."""
        ...


class Tally:
    """Distinct token ids of a row, and how often each was generated; 0 for those of the prompt alone.

    Kept as arrays that grow by doubling, so that neither a step nor a token costs more the longer the text is
    beyond reading the arrays.
    """

    def __init__(self, prompt_ids: Sequence[int] = ()) -> None:
        known = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._size = len(known)
        self._ids = np.zeros(max(64, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = known
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slots = {token: slot for slot, token in enumerate(known.tolist())}

    def add(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slots.setdefault(token, self._size)
        if slot == self._size:
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token
            self._size += 1
        self._counts[slot] += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """(distinct,) token ids, in no order that matters."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """(distinct,) how often each was generated."""
        return self._counts[: self._size]


class RowState:
    """What sampling remembers of one row.

    Attributes:
        params: the request's parameters.
        ends: token ids that must not come before `min_tokens`.
        processors: changes to the row's logits, after penalties and forbidden tokens.
        tokens: generated token ids.
        tally: what the penalties look at; empty unless one is on.
        bias: token ids (n,) and what is added to them (n,), from `logit_bias`.
        forbidden: the `ends`, (n,).
        run: the way through the request's grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        ends: frozenset[int],
        stream: random.Random,
        prompt_ids: Sequence[int] = (),
        processors: Sequence[LogitsProcessor] = (),
        run: Run | None = None,
    ) -> None:
        self.params = params
        self.run = run
        self.ends = ends
        self.processors = tuple(processors)
        self.tokens: list[int] = []
        self.penalised = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        self.tally = Tally(prompt_ids if params.repetition_penalty != 1.0 else ())
        biased = dict(params.logit_bias)
        self.bias = (
            np.fromiter(biased, dtype=np.int64, count=len(biased)),
            np.fromiter(biased.values(), dtype=np.float32, count=len(biased)),
        )
        self.forbidden = np.asarray(sorted(ends), dtype=np.int64)
        named = np.concatenate([self.tally.ids, self.bias[0], self.forbidden])
        self._named = (int(named.min()), int(named.max())) if named.size else (0, 0)
        self._stream = stream
        self._point: float | None = None

    @classmethod
    def start(
        cls,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        ends: frozenset[int],
        processors: Sequence[LogitsProcessor] = (),
        run: Run | None = None,
    ) -> "RowState":
        """State before the first token; a seed of None draws a fresh one."""
        stream = random.Random(params.seed)  # noqa: S311 sampling, not secrets
        return cls(params, ends, stream, prompt_ids, processors, run)

    def record(self, token: int) -> None:
        """Count a chosen token; the next choice uses the next random number."""
        self._point = None
        self.tokens.append(token)
        if self.penalised:
            self.tally.add(token)
        if self.run is not None:
            self.run.advance(token)

    @property
    def complete(self) -> bool:
        """A grammar allows nothing more."""
        return self.run is not None and self.run.complete

    def point(self) -> float:
        """This position's uniform number in [0, 1): the same until a token is recorded, so a choice that has
        to be made again comes out the same.
        """
        if self._point is None:
            self._point = self._stream.random()
        return self._point

    @property
    def generated(self) -> int:
        """How many tokens were chosen."""
        return len(self.tokens)

    @property
    def waits(self) -> bool:
        """The row is too short to end."""
        return bool(self.ends) and self.generated < self.params.min_tokens

    @property
    def edits_logits(self) -> bool:
        """The row's logits change before the choice."""
        return self.penalised or self.waits or bool(self.processors) or self.bias[0].size > 0

    def check(self, vocabulary: int) -> None:
        """Raises ValueError if the row names a token that the model does not have."""
        low, high = self._named
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocabulary}")
