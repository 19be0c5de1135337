"""Materialised weights W* + Σ g_t·U_tΣ_tV_t of single patterns: a byte-bounded cache, made beside the engine.

A step whose tokens all have one pattern can run on such weights at the price of the plain model. Making them
costs as much as many steps, so it is decided like renting or buying skis: once a pattern has cost as much
extra as its weights would, they are made. Always from W*, never by adding to and subtracting from other weights.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from service.core import ExpertKey, Pattern
from service.gating.bank import ExpertBank
from service.gating.resident import MatrixFactors
from service.native.decoder import SHARED_BASE, NativeDecoder, PreparedBase

_log = logging.getLogger(__name__)

MixMode = Literal["auto", "factored", "merged"]

_WATCHED = 256
"""Patterns whose extra cost is remembered."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What mixing costs on this machine, measured at start-up; all in seconds.

    Attributes:
        extra: (tokens of the step, seconds that a factored step takes longer than a plain one), ascending.
        making: to materialise and pack the weights of one pattern, on the thread that does it.
        ranks: factor rows of every token when `extra` was measured; it is taken to grow with them.
    """

    extra: tuple[tuple[int, float], ...] = ((1, 0.0),)
    making: float = float("inf")
    ranks: int = 16

    def extra_of(self, tokens: int) -> float:
        """Interpolated between the measured counts, proportional beyond the last."""
        previous, cost = self.extra[0]
        if tokens <= previous:
            return cost
        for count, seconds in self.extra[1:]:
            if tokens <= count:
                return cost + (seconds - cost) * (tokens - previous) / (count - previous)
            previous, cost = count, seconds
        return cost * tokens / previous


@dataclass(slots=True)
class _Entry:
    base: int
    nbytes: int


@dataclass(slots=True)
class MergedStats:
    """Totals since the start."""

    made: int = 0
    evicted: int = 0
    failed: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class _Making:
    pattern: Pattern
    future: "Future[PreparedBase]" = field(repr=False)


class MergedWeights:
    """Chooses the weight set of a step. Its methods are for the engine thread.

    Args:
        mode: "auto" decides by `costs`; "merged" makes weights for every pattern that has a step to itself;
            "factored" never does.
        max_bytes: of all materialised weights together; the shared expert's own do not count.
        executor: where weights are made, one set at a time; limited to one torch thread.
    """

    def __init__(
        self,
        bank: ExpertBank,
        native: NativeDecoder,
        executor: Executor,
        *,
        mode: MixMode = "auto",
        max_bytes: int = 0,
        costs: StepCosts | None = None,
    ) -> None:
        self.costs = costs or StepCosts()
        self.stats = MergedStats()
        self._bank = bank
        self._native = native
        self._executor = executor
        self._mode = mode
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Pattern, _Entry] = OrderedDict()
        self._paid: OrderedDict[Pattern, float] = OrderedDict()
        self._making: _Making | None = None
        self._next = SHARED_BASE + 1
        self._size = sum(module.weight.nbytes for module in native.parts.modules.values())
        if mode != "factored" and self._size > max_bytes:
            _log.warning(
                "one set of merged weights takes %d bytes, more than the %d allowed", self._size, max_bytes
            )

    def choose(self, patterns: Sequence[Pattern], tokens: int) -> int:
        """The weight set for a step of that many tokens whose sequences have these patterns."""
        if self._mode == "factored" or self._size > self._max_bytes:
            return SHARED_BASE
        self._settle()
        first = patterns[0] if patterns else Pattern()
        if not first.gates or any(pattern != first for pattern in patterns):
            return SHARED_BASE
        entry = self._entries.get(first)
        if entry is not None:
            self._entries.move_to_end(first)
            return entry.base
        if self._making is None and self._pays(first, tokens) and self._bank.mergeable(first):
            self._start(first)
            self._settle()
            made = self._entries.get(first)
            if made is not None:
                return made.base
        return SHARED_BASE

    def forget(self, key: ExpertKey) -> None:
        """A generation exists no more: drop what was made of it."""
        for pattern in [pattern for pattern in self._entries if key in pattern.experts]:
            self._drop(pattern)
        if self._making is not None and key in self._making.pattern.experts:
            self._making.future.cancel()
            self._making = None

    def _pays(self, pattern: Pattern, tokens: int) -> bool:
        if self._mode == "merged":
            return True
        ranks = sum(expert.max_rank for key, _ in pattern.gates if (expert := self._bank.resident(key)))
        paid = self._paid.pop(pattern, 0.0) + self.costs.extra_of(tokens) * ranks / self.costs.ranks
        self._paid[pattern] = paid
        if len(self._paid) > _WATCHED:
            self._paid.popitem(last=False)
        return paid >= self.costs.making

    def _start(self, pattern: Pattern) -> None:
        mix = [(self._bank.resident(key), gate) for key, gate in pattern.gates]
        factors = [(expert.matrices, gate) for expert, gate in mix if expert is not None]
        own = self._native.parts.modules

        def weight_of(name: str) -> Tensor:
            return materialised(own[name].weight, [(m[name], gate) for m, gate in factors if name in m])

        self._making = _Making(pattern, self._executor.submit(self._native.prepare, weight_of))

    def _settle(self) -> None:
        making = self._making
        if making is None or not making.future.done():
            return
        self._making = None
        self._paid.pop(making.pattern, None)
        try:
            prepared = making.future.result()
        except Exception:  # noqa: BLE001 steps go on without
            _log.exception("materialised weights for %s could not be made", making.pattern)
            self.stats.failed += 1
            # Not again for this pattern before it has cost as much once more.
            self._paid[making.pattern] = 0.0
            return
        while self._entries and self.stats.nbytes + prepared.nbytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
            self.stats.evicted += 1
        self._native.install(self._next, prepared)
        self._entries[making.pattern] = _Entry(self._next, prepared.nbytes)
        self._next += 1
        self.stats.made += 1
        self.stats.nbytes += prepared.nbytes

    def _drop(self, pattern: Pattern) -> None:
        entry = self._entries.pop(pattern)
        self._native.drop_base(entry.base)
        self.stats.nbytes -= entry.nbytes


@torch.inference_mode()
def materialised(weight: Tensor, mix: Sequence[tuple[MatrixFactors, float]]) -> Tensor:
    """W* + Σ g·(A, B) as an (out, in) matrix in the dtype of `weight`; summed in float32."""
    if not mix:
        return weight
    total = weight.to(torch.float32)
    for factors, gate in mix:
        b = factors.rows(weight.shape[0]).to(torch.float32)
        total = torch.addmm(total, b.t(), factors.a.to(torch.float32), alpha=gate)
    return total.to(weight.dtype)
