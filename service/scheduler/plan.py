"""What the scheduler tells the engine to do."""

from dataclasses import dataclass, field

from service.scheduler.sequence import Sequence


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
    """`count` tokens of a sequence, from its `computed` on."""

    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        decode: sequences with one token to compute, equal patterns side by side.
        prefill: prompts, and sequences that were preempted and compute everything again.
        preempted: who lost its blocks to others and waits again.
    """

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
