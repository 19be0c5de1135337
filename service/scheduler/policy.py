"""What an operator decides about scheduling: plain numbers, frozen."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard bounds.

    Attributes:
        max_running: most sequences that hold blocks at a time, at least 1.
    """

    max_running: int


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens that a step may carry.

    Attributes:
        step_tokens: prompt tokens of a step in which nobody decodes.
        chunk_tokens: prompt tokens beside decoding sequences, so that a long prompt does not stall them.
    """

    step_tokens: int = 1024
    chunk_tokens: int = 96


@dataclass(frozen=True, slots=True)
class Policy:
    """Order of admission.

    Attributes:
        max_wait_seconds: whoever has waited longer goes by arrival alone, ahead of priorities, fair share and
            affinity.
        max_active_experts: distinct experts that should run together; a soft bound, None is none.
        fair_share: clients take turns by the tokens that they got.
        prompt_weight: what a computed prompt token counts in a client's share.
        generated_weight: what a generated one counts.
    """

    max_wait_seconds: float = 10.0
    max_active_experts: int | None = None
    fair_share: bool = True
    prompt_weight: float = 1.0
    generated_weight: float = 2.0
