"""One planned step through the model: pack, gate, forward. A fault is pinned to the sequences that cause it."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.core import Pattern, StepMode
from service.engine.layout import Chunk, PackLayout, Segment
from service.engine.live import Live, Question
from service.engine.model import SharedModel
from service.scheduler.scheduler import PrefillChunk, StepPlan
from service.scheduler.sequence import Sequence

logger = logging.getLogger(__name__)
_SHARED = Pattern()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes.

    Attributes:
        routed: requests and questions for the router.
        routed_ids: the tokens that the router reads of each.
    """

    plan: StepPlan
    routed: list[Live | Question] = field(default_factory=list)
    routed_ids: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def participants(self) -> int:
        """Sequences and prompts in the step."""
        return len(self.plan.decode) + len(self.plan.prefill) + len(self.routed)


@dataclass(slots=True)
class Conclusion:
    """What came of a step.

    Attributes:
        logits: (sampled, vocabulary); None if no sequence reached a token.
        sampled: the sequence of every row of `logits`.
        advanced: sequences and how many of their tokens are newly in the cache.
        routed: router input → features (d,) or the error.
        failed: sequences whose own computation raised.
    """

    mode: StepMode = "shared"
    active_experts: int = 0
    patterns: int = 0
    rebuilt: bool = False
    logits: Tensor | None = None
    sampled: list[Sequence] = field(default_factory=list)
    advanced: list[tuple[Sequence, int]] = field(default_factory=list)
    routed: list[tuple[Live | Question, Tensor | Exception | None]] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)


@torch.inference_mode()
def run_step(model: SharedModel, step: Step) -> Conclusion:
    """Run a step; if it raises, run every participant alone and fail only those that raise again.

    Re-running is harmless: a sequence writes the same cache positions with the same values.
    """
    for move in step.plan.moves:
        model.cache.move(move.source, move.target, move.sequence.computed)
    if not step.participants:
        return Conclusion()
    try:
        return _run(model, step)
    except Exception as error:
        if step.participants == 1:
            logger.exception("a step with one participant failed")
            return _failure(step, error)
        logger.warning("a step failed (%s); its participants run one by one", error)
    parts = [
        *(Step(StepPlan(decode=[sequence])) for sequence in step.plan.decode),
        *(Step(StepPlan(prefill=[chunk])) for chunk in step.plan.prefill),
        *(Step(StepPlan(), [item], [ids]) for item, ids in zip(step.routed, step.routed_ids, strict=True)),
    ]
    return _joined([run_step(model, part) for part in parts])


def _run(model: SharedModel, step: Step) -> Conclusion:
    plan = step.plan
    tokens = [sequence.tokens[sequence.computed] for sequence in plan.decode]
    positions = [sequence.computed for sequence in plan.decode]
    kept = list(range(len(tokens)))
    counts = [1] * len(tokens)
    keeps = [1] * len(tokens)
    sampled = list(plan.decode)
    chunks: list[Chunk] = []
    for part in plan.prefill:
        sequence, begin, start = part.sequence, len(tokens), part.sequence.computed
        tokens.extend(sequence.tokens[start : start + part.count])
        positions.extend(range(start, start + part.count))
        chunks.append(Chunk(begin, len(tokens), _row(sequence), start))
        complete = _completes(part)
        if complete:
            kept.append(len(tokens) - 1)
            sampled.append(sequence)
        counts.append(part.count)
        keeps.append(int(complete))
    segments: list[Segment] = []
    for ids in step.routed_ids:
        segments.append(Segment(len(tokens), len(tokens) + len(ids)))
        tokens.extend(ids)
        positions.extend(range(len(ids)))
        counts.append(len(ids))
        keeps.append(0)
    patterns = [
        *(s.pattern or _SHARED for s in plan.decode),
        *(part.sequence.pattern or _SHARED for part in plan.prefill),
        *(_SHARED for _ in segments),
    ]
    layout = PackLayout(
        tuple(_row(s) for s in plan.decode),
        tuple(positions[: len(plan.decode)]),
        tuple(chunks),
        tuple(segments),
    )
    gates = model.bank.begin_step(patterns, counts, keeps)
    output = model.forward(tokens, positions, layout, kept)
    features = output.features
    return Conclusion(
        mode=gates.mode,
        active_experts=gates.active,
        patterns=len(set(patterns)),
        rebuilt=gates.repacked,
        logits=output.logits if sampled else None,
        sampled=sampled,
        advanced=[(s, 1) for s in plan.decode] + [(part.sequence, part.count) for part in plan.prefill],
        routed=[
            (item, None if features is None else features[index].cpu())
            for index, item in enumerate(step.routed)
        ],
    )


def _failure(step: Step, error: Exception) -> Conclusion:
    plan = step.plan
    sequences = [*plan.decode, *(part.sequence for part in plan.prefill)]
    return Conclusion(
        failed=[(sequence, error) for sequence in sequences], routed=[(item, error) for item in step.routed]
    )


def _joined(parts: list[Conclusion]) -> Conclusion:
    logits = [part.logits for part in parts if part.logits is not None]
    return Conclusion(
        mode="factored" if any(part.mode == "factored" for part in parts) else "shared",
        active_experts=max(part.active_experts for part in parts),
        patterns=max(part.patterns for part in parts),
        rebuilt=any(part.rebuilt for part in parts),
        logits=torch.cat(logits) if logits else None,
        sampled=[s for part in parts for s in part.sampled],
        advanced=[a for part in parts for a in part.advanced],
        routed=[r for part in parts for r in part.routed],
        failed=[f for part in parts for f in part.failed],
    )


def _completes(part: PrefillChunk) -> bool:
    return part.sequence.computed + part.count == part.sequence.prompt_length


def _row(sequence: Sequence) -> int:
    assert sequence.row is not None, "a sequence runs without a KV row"
    return sequence.row
