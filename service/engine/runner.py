"""One planned step through the model: pack, gate, forward. A fault is pinned to the sequences that cause it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from service.core import Pattern, StepMode
from service.engine.correction import Correction
from service.engine.layout import Chunk, Decode, PackLayout, Segment
from service.engine.live import Live, Question
from service.engine.merged import MergedWeights
from service.engine.model import Batch, SharedModel
from service.engine.reading import Settle
from service.native.decoder import SHARED_BASE
from service.scheduler.plan import PrefillChunk, StepPlan
from service.scheduler.sequence import Sequence

logger = logging.getLogger(__name__)
_SHARED = Pattern()

Decide = Callable[[Sequence, Tensor], Pattern]
"""The gates of a single-pass sequence, given its features (d,) float32; the same when asked again."""

Settles = Callable[[list[Live | Question], Tensor], list[bool]]
"""For which router inputs their features (n, d) float32 of the first tap are enough."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes.

    Attributes:
        routed: requests and questions for the router.
        routed_ids: the tokens that the router reads of each.
        decide: asked for sequences that are routed in the middle of the step.
        settle: asked of prompts to route, once the router's first tap is read.
    """

    plan: StepPlan
    routed: list[Live | Question] = field(default_factory=list)
    routed_ids: list[tuple[int, ...]] = field(default_factory=list)
    decide: Decide | None = None
    settle: Settles | None = None

    @property
    def participants(self) -> int:
        """Sequences and prompts in the step."""
        return len(self.plan.decode) + len(self.plan.prefill) + len(self.routed)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Logits of prompt tokens that a request wants to know about.

    Attributes:
        first: position of the token that the first row predicts.
        begin, end: rows of the conclusion's logits.
    """

    sequence: Sequence
    first: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Final states of prompt tokens that a request wants pooled.

    Attributes:
        first: position of the first row's token.
        begin, end: rows of the conclusion's states; the last token's alone, or none, where only that one counts.
        whole: they are the last of the prompt.
        count: prompt tokens of its chunk.
    """

    sequence: Sequence
    first: int
    begin: int
    end: int
    whole: bool
    count: int


@dataclass(slots=True)
class Conclusion:
    """What came of a step.

    Attributes:
        logits: (kept, vocabulary); None if no token's logits were wanted.
        sampled: (sequence, row of `logits`) of every sequence that gets a token.
        prompts: rows of prompt tokens.
        states: (pooled tokens, hidden) behind the final norm; None if nobody pools.
        pooled: rows of `states`.
        advanced: sequences and how many of their tokens are newly in the cache.
        routed: router input → features (d,) or the error.
        failed: sequences whose own computation raised.
    """

    mode: StepMode = "shared"
    active_experts: int = 0
    patterns: int = 0
    rebuilt: bool = False
    logits: Tensor | None = None
    sampled: list[tuple[Sequence, int]] = field(default_factory=list)
    prompts: list[PromptRows] = field(default_factory=list)
    states: Tensor | None = None
    pooled: list[PooledRows] = field(default_factory=list)
    advanced: list[tuple[Sequence, int]] = field(default_factory=list)
    routed: list[tuple[Live | Question, Tensor | Exception | None]] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)


@torch.inference_mode()
def run_step(
    model: SharedModel,
    step: Step,
    merged: MergedWeights | None = None,
    correction: Correction | None = None,
) -> Conclusion:
    """Run a step; if it raises, run every participant alone and fail only those that raise again.

    Re-running is harmless: a sequence writes the same cache positions with the same values.
    """
    if not step.participants:
        return Conclusion()
    try:
        return _run(model, step, merged, correction)
    except Exception as error:
        if step.participants == 1:
            logger.exception("a step with one participant failed")
            return _failure(step, error)
        logger.warning("a step failed (%s); its participants run one by one", error)
    parts = [
        *(Step(StepPlan(decode=[sequence])) for sequence in step.plan.decode),
        *(Step(StepPlan(prefill=[chunk]), decide=step.decide) for chunk in step.plan.prefill),
        *(
            Step(StepPlan(), [item], [ids], settle=step.settle)
            for item, ids in zip(step.routed, step.routed_ids, strict=True)
        ),
    ]
    return _joined([run_step(model, part, correction=correction) for part in parts])


class _Packing:
    """A batch in the making, and which of its logits belong to whom."""

    def __init__(self) -> None:
        self.batch = Batch()
        self.sampled: list[tuple[Sequence, int]] = []
        self.prompts: list[PromptRows] = []
        self.pooled: list[PooledRows] = []
        self.chunks: list[Chunk] = []
        self.late: dict[int, Segment] = {}
        self.unrouted: dict[int, Sequence] = {}

    def decode(self, sequence: Sequence) -> Decode:
        """The sequence's last token."""
        self.sampled.append((sequence, len(self.batch.kept)))
        self._add(sequence, [sequence.tokens[sequence.computed]], sequence.computed)
        self._keep(1)
        return Decode(sequence.computed, sequence.tables)

    def prefill(self, part: PrefillChunk) -> None:
        """A run of the sequence's tokens."""
        sequence, begin, start = part.sequence, len(self.batch.tokens), part.sequence.computed
        if sequence.unrouted:
            self.late[len(self.batch.counts)] = Segment(begin, begin + part.count)
            self.unrouted[len(self.batch.counts)] = sequence
        self._add(sequence, sequence.tokens[start : start + part.count], start)
        self.chunks.append(Chunk(begin, len(self.batch.tokens), start, sequence.tables))
        if sequence.request.sampling.prompt_logprobs is not None and not sequence.generated:
            kept = len(self.batch.kept)
            wanted = min(start + part.count, sequence.prompt_length - 1) - start
            self.prompts.append(PromptRows(sequence, start + 1, kept, kept + wanted))
            self.batch.kept.extend(range(begin, begin + wanted))
            self.batch.keeps[-1] += wanted
        if sequence.request.pooling is not None:
            self._pool(part, begin, start)
        elif part.count == sequence.pending:
            self.sampled.append((sequence, len(self.batch.kept)))
            self._keep(1)

    def route(self, ids: tuple[int, ...]) -> Segment:
        """A prompt that is read for the router alone."""
        begin = len(self.batch.tokens)
        self.batch.tokens.extend(ids)
        self.batch.positions.extend(range(len(ids)))
        self.batch.counts.append(len(ids))
        self.batch.keeps.append(0)
        self.batch.patterns.append(_SHARED)
        self.batch.lower.append(_SHARED)
        return Segment(begin, len(self.batch.tokens))

    def _pool(self, part: PrefillChunk, begin: int, start: int) -> None:
        """States are wanted instead of a token: of the whole chunk, or of the prompt's last token."""
        sequence, row = part.sequence, len(self.batch.pooled)
        whole = part.count == sequence.pending
        wanted = part.count if sequence.request.pooling == "mean" else int(whole)
        end = begin + part.count
        self.batch.pooled.extend(range(end - wanted, end))
        first = start + part.count - wanted
        self.pooled.append(PooledRows(sequence, first, row, row + wanted, whole, part.count))

    def _keep(self, count: int) -> None:
        """The last tokens' logits are wanted."""
        self.batch.kept.extend(range(len(self.batch.tokens) - count, len(self.batch.tokens)))
        self.batch.keeps[-1] += count

    def _add(self, sequence: Sequence, tokens: list[int], start: int) -> None:
        batch, pattern, end = self.batch, sequence.pattern or _SHARED, start + len(tokens)
        batch.tokens.extend(tokens)
        batch.positions.extend(range(start, end))
        # Single-pass routing leaves the prompt without gates below the routing depth, and only the prompt.
        bare = max(start, min(end, sequence.prompt_length)) if sequence.single_pass else start
        for count, lower in ((bare - start, _SHARED), (end - bare, pattern)):
            if count:
                batch.counts.append(count)
                batch.keeps.append(0)
                batch.patterns.append(pattern)
                batch.lower.append(lower)


def _run(
    model: SharedModel, step: Step, merged: MergedWeights | None, correction: Correction | None
) -> Conclusion:
    plan, packing = step.plan, _Packing()
    decode = tuple(packing.decode(sequence) for sequence in plan.decode)
    for part in plan.prefill:
        packing.prefill(part)
    segments = tuple(packing.route(ids) for ids in step.routed_ids)
    batch = packing.batch
    batch.layout = PackLayout(decode, tuple(packing.chunks), segments)
    batch.late = packing.late
    batch.settle = _for_gates(step)
    if packing.late:
        decide = step.decide
        assert decide is not None, "a sequence without gates, and nobody to find them"
        batch.decide = lambda index, features: decide(packing.unrouted[index], features)
    wanted = len(set(batch.patterns))
    if merged is not None and not segments and batch.lower == batch.patterns:
        batch.base = merged.choose(batch.patterns, len(batch.tokens))
        if batch.base != SHARED_BASE:
            batch.patterns = batch.lower = [_SHARED] * len(batch.patterns)
    output = model.forward(batch) if correction is None else correction.forward(model, batch)
    mode: StepMode = "factored" if output.gates.active else "shared"
    return Conclusion(
        mode="merged" if batch.base != SHARED_BASE else mode,
        active_experts=output.gates.active,
        patterns=wanted,
        rebuilt=output.gates.repacked,
        logits=output.logits if batch.kept else None,
        sampled=packing.sampled,
        prompts=packing.prompts,
        states=output.states,
        pooled=packing.pooled,
        advanced=[(s, 1) for s in plan.decode] + [(part.sequence, part.count) for part in plan.prefill],
        routed=[
            (item, None if output.features is None else output.features[index].cpu())
            for index, item in enumerate(step.routed)
        ],
    )


def _for_gates(step: Step) -> Settle | None:
    """The step's `settle` where somebody may need no more; questions always do."""
    settle, routed = step.settle, step.routed
    if settle is None or not any(isinstance(item, Live) for item in routed):
        return None
    return lambda features: settle(routed, features)


def _failure(step: Step, error: Exception) -> Conclusion:
    plan = step.plan
    sequences = [*plan.decode, *(part.sequence for part in plan.prefill)]
    return Conclusion(
        failed=[(sequence, error) for sequence in sequences], routed=[(item, error) for item in step.routed]
    )


def _joined(parts: list[Conclusion]) -> Conclusion:
    whole = Conclusion(
        mode="factored" if any(part.mode == "factored" for part in parts) else "shared",
        active_experts=max(part.active_experts for part in parts),
        patterns=max(part.patterns for part in parts),
        rebuilt=any(part.rebuilt for part in parts),
        advanced=[a for part in parts for a in part.advanced],
        routed=[r for part in parts for r in part.routed],
        failed=[f for part in parts for f in part.failed],
    )
    logits: list[Tensor] = []
    states = [part.states for part in parts if part.states is not None]
    rows = row = 0
    for part in parts:
        whole.pooled += [replace(p, begin=row + p.begin, end=row + p.end) for p in part.pooled]
        row += 0 if part.states is None else len(part.states)
        if part.logits is None:
            continue
        whole.sampled += [(sequence, rows + row) for sequence, row in part.sampled]
        whole.prompts += [PromptRows(p.sequence, p.first, rows + p.begin, rows + p.end) for p in part.prompts]
        logits.append(part.logits)
        rows += len(part.logits)
    whole.logits = torch.cat(logits) if logits else None
    whole.states = torch.cat(states) if states else None
    return whole
