"""Sequences in one line, and an engine that remembers what every block holds instead of computing it."""

import itertools
from collections import Counter

from service.core import ExpertKey, GenerationRequest, Pattern, SamplingParams
from service.scheduler.blocks import BLOCK_TOKENS, NULL_BLOCK, KvBlocks, KvGroup
from service.scheduler.plan import StepPlan
from service.scheduler.policy import Budget, Limits, Policy
from service.scheduler.scheduler import Scheduler
from service.scheduler.sequence import Sequence

_numbers = itertools.count()


def pattern(*experts: str, weight: float = 1.0) -> Pattern:
    """`a@2` is generation 2 of a; without it generation 1."""
    keys = (
        ExpertKey(name, int(generation or 1)) for name, _, generation in (e.partition("@") for e in experts)
    )
    return Pattern(tuple((key, weight) for key in sorted(keys)))


def sequence(
    prompt: int | tuple[int, ...] = 4,
    gates: Pattern | None = Pattern(),  # noqa: B008 frozen
    *,
    name: str | None = None,
    max_tokens: int = 64,
    single_pass: bool = False,
    prompt_logprobs: int | None = None,
    **request: object,
) -> Sequence:
    """A request of that many prompt tokens, or of those."""
    number = next(_numbers)
    ids = prompt if isinstance(prompt, tuple) else tuple(1000 * (number + 1) + i for i in range(prompt))
    sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    return Sequence(
        GenerationRequest(name or f"r{number}", ids, sampling, **request), gates, single_pass=single_pass
    )


def scheduler(
    blocks: int = 1000,
    *,
    max_running: int = 8,
    budget: Budget | None = None,
    policy: Policy | None = None,
    windows: tuple[int | None, ...] = (None,),
    prefix_cache: bool = True,
    **options,
) -> Scheduler:
    """One with `blocks` usable blocks in each group."""
    kv = KvBlocks([KvGroup(window, blocks + 1) for window in windows], prefix_cache=prefix_cache)
    return Scheduler(Limits(max_running), kv, budget or Budget(), policy or Policy(), **options)


class Memory:
    """Blocks hold, for each token, what its keys and values depend on: weights and all tokens so far."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cells: dict[tuple[int, int, int], object] = {}
        self._weights: Counter[ExpertKey] = Counter()
        self._met: dict[Sequence, tuple[int, ...]] = {}

    def replace(self, key: ExpertKey) -> None:
        """From now on other weights go by that key, for everybody who comes."""
        self._weights[key] += 1

    def meet(self, each: Sequence) -> None:
        """A sequence comes: the weights of now are what it computes with."""
        if each.pattern is not None:
            self._met[each] = tuple(self._weights[key] for key, _ in each.pattern.gates)

    def run(self, plan: StepPlan, token: int = 7, late: Pattern | None = None) -> None:
        """Compute a plan, check that attention would see the right things, conclude.

        Args:
            token: what every sequence samples.
            late: the pattern that a single-pass prefill finds.
        """
        work = [(each, 1) for each in plan.decode] + [(chunk.sequence, chunk.count) for chunk in plan.prefill]
        written: set[tuple[int, int, int]] = set()
        for each, count in work:
            if each.pattern is None:
                each.pattern = late or Pattern()
                self.meet(each)
            cells = self._write(each, count)
            assert not cells & written, "two sequences write to one place"
            written |= cells
        for each, count in work:
            self._attend(each, each.computed + count - 1)
        for each, count in work:
            self.scheduler.advanced(each, count)
            if not each.pending:
                each.tokens.append(token)

    def spoil(self, plan: StepPlan) -> None:
        """A step that fails half-way: it wrote, but nothing good."""
        for each in plan.decode:
            self._write(each, 1, junk=True)
        for chunk in plan.prefill:
            self._write(chunk.sequence, chunk.count, junk=True)

    def wipe(self, blocks: list[tuple[int, int]]) -> None:
        """What the engine does with the blocks of a failed sequence."""
        for cell in [cell for cell in self.cells if cell[:2] in set(blocks)]:
            del self.cells[cell]

    def junk(self) -> set[tuple[int, int]]:
        """Blocks that hold what a failed step wrote."""
        return {cell[:2] for cell, content in self.cells.items() if content == "junk"}

    def _write(self, each: Sequence, count: int, *, junk: bool = False) -> set[tuple[int, int, int]]:
        cells = set()
        for position in range(each.computed, each.computed + count):
            for number, table in enumerate(each.tables):
                block = table[position // BLOCK_TOKENS]
                assert block != NULL_BLOCK, "a planned token has no block"
                cell = (number, block, position % BLOCK_TOKENS)
                self.cells[cell] = "junk" if junk else self._content(each, position)
                cells.add(cell)
        return cells

    def _attend(self, each: Sequence, position: int) -> None:
        for number, (group, table) in enumerate(zip(self.scheduler.kv.groups, each.tables, strict=True)):
            first = 0 if group.window is None else max(0, position - group.window + 1)
            for seen in range(first, position + 1):
                cell = (number, table[seen // BLOCK_TOKENS], seen % BLOCK_TOKENS)
                assert self.cells.get(cell) == self._content(each, seen), "attention sees another's keys"

    def _content(self, each: Sequence, position: int) -> object:
        prefix = hash(tuple(each.tokens[: position + 1]))
        return each.pattern, self._met.get(each), each.single_pass, prefix


def step(scheduler: Scheduler, now: float = 0.0, token: int = 7) -> StepPlan:
    """One step that goes well, with the whole budget; everybody samples the same token."""
    plan = scheduler.plan(scheduler.prompt_budget().total, now)
    for each, count in [
        *((decoding, 1) for decoding in plan.decode),
        *((chunk.sequence, chunk.count) for chunk in plan.prefill),
    ]:
        scheduler.advanced(each, count)
        if not each.pending:
            each.tokens.append(token)
    return plan
