"""Who takes part in the next step: first come, first served; decoding rows always, prompts by token budget."""

from collections import deque
from dataclasses import dataclass, field

from service.scheduler.rows import RowPool
from service.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that a step may carry.

    Attributes:
        step_tokens: prompt tokens of a step in which nobody decodes.
        chunk_tokens: prompt tokens beside decoding rows, so that a long prompt does not stall them.
    """

    step_tokens: int = 1024
    chunk_tokens: int = 256


@dataclass(frozen=True, slots=True)
class PromptBudget:
    """Prompt tokens of the coming step.

    Attributes:
        total: to prefill and to route together.
        routing: of those, what routing may take while prompts wait for prefill; it may take one prompt
            in any case.
    """

    total: int
    routing: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """`count` prompt tokens of a sequence, from its `computed` on."""

    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class RowMove:
    """Copy a sequence's cache from one row to a lower one before the step."""

    sequence: Sequence
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Decoding sequences are in ascending row order."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    moves: list[RowMove] = field(default_factory=list)


class Scheduler:
    """Queues and rows.

    Invariant: every admitted sequence has a row of its own; free rows + admitted sequences = all rows.
    """

    def __init__(self, rows: int, budget: Budget) -> None:
        self.rows = RowPool(rows)
        self.budget = budget
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose pattern is known."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its row. Harmless if it is not here."""
        if sequence.row is not None:
            self.running.remove(sequence)
            self.rows.give(sequence.row)
            sequence.row = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def prompt_budget(self) -> PromptBudget:
        """How many prompt tokens the coming step may carry, and how many of them for the router."""
        decoding = any(not sequence.in_prefill for sequence in self.running)
        total = self.budget.chunk_tokens if decoding else self.budget.step_tokens
        prefilling = any(sequence.in_prefill for sequence in self.running) or self.waiting
        return PromptBudget(total, max(1, total // 2) if prefilling else total)

    def plan(self, prompt_tokens: int) -> StepPlan:
        """Admit what fits and lay out the next step.

        Args:
            prompt_tokens: most prompt tokens to prefill in it.
        """
        while self.waiting and (row := self.rows.take()) is not None:
            sequence = self.waiting.popleft()
            sequence.row = row
            self.running.append(sequence)
        moves = self._compact()
        decode = sorted((s for s in self.running if not s.in_prefill), key=lambda s: s.row or 0)
        left = prompt_tokens
        prefill: list[PrefillChunk] = []
        for sequence in self.running:
            if sequence.in_prefill and left > 0:
                count = min(left, sequence.prompt_length - sequence.computed)
                prefill.append(PrefillChunk(sequence, count))
                left -= count
        return StepPlan(decode, prefill, moves)

    def _compact(self) -> list[RowMove]:
        """Decoding attends over rows up to the highest live one; pull that down when most are empty."""
        moves: list[RowMove] = []
        while self.running:
            highest = max(self.running, key=lambda s: s.row or 0)
            target = self.rows.lowest_free
            if highest.row is None or target is None or highest.row + 1 <= 2 * len(self.running):
                break
            if highest.in_prefill:
                # Its cached values are not proven finite yet; what a move leaves behind must be.
                break
            source = highest.row
            self.rows.take()
            self.rows.give(source)
            highest.row = target
            moves.append(RowMove(highest, source, target))
        return moves
