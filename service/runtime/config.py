"""Frozen values that the settings give to a runtime."""

from dataclasses import dataclass, field

from service.engine.assembly import EngineOptions
from service.grammar import GrammarOptions


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Frozen values that the settings give.

    Attributes:
        engine: everything about the engine itself; its context is cut to the model's own.
        max_queue: requests that may wait beyond those that run.
        backlog: events of one request that may wait to be read.
        grammars: bounds of constraints on answers.
        device: torch device, or "auto" for CUDA where there is one.
        dtype: torch dtype name, or "auto" for bfloat16.
        threads: intra-op threads of the engine; None leaves torch's choice.
        max_experts: experts on the device at once; None is no limit.
        max_expert_bytes: bytes of their factors; None is no limit.
        pinned_experts: names whose experts stay on the device once they are there.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)
    max_queue: int = 256
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    max_experts: int | None = None
    max_expert_bytes: int | None = None
    pinned_experts: tuple[str, ...] = ()
    backlog: int = 1024
    grammars: GrammarOptions = field(default_factory=GrammarOptions)
