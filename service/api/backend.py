"""What the API needs of the runtime, as protocols; `service.runtime.Runtime` fits them."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from service.core import (
    Constraint,
    EngineGauges,
    Event,
    ExpertStatus,
    GenerationRequest,
    RoutingChoice,
    RoutingOutcome,
)


class Generation(Protocol):
    """Events of one sequence; exactly one is terminal, then the iteration stops."""

    def __aiter__(self) -> "Generation":
        """Itself."""
        ...

    async def __anext__(self) -> Event:
        """The next event."""
        ...

    def cancel(self) -> None:
        """Stop generating; idempotent, also after the end."""
        ...


class Backend(Protocol):
    """The runtime as the API sees it; everything is called on the event loop."""

    @property
    def tokenizer(self) -> Any:
        """The shared folder's tokenizer, with its chat template."""
        ...

    @property
    def vocab_size(self) -> int:
        """Prompt token ids are below it."""
        ...

    @property
    def state_size(self) -> int:
        """Values of a pooled state."""
        ...

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def bundle_name(self) -> str:
        """The model name that asks the router."""
        ...

    @property
    def alive(self) -> bool:
        """False once the engine thread has ended."""
        ...

    @property
    def ready(self) -> bool:
        """True while new requests are taken."""
        ...

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue one sequence, or raise before anything is queued."""
        ...

    async def route(
        self, prompts: Sequence[tuple[int, ...]], choice: RoutingChoice
    ) -> Sequence[RoutingOutcome]:
        """Gates of each prompt, without generating."""
        ...

    async def compile(self, constraint: Constraint) -> object:
        """The grammar of `GenerationRequest` for a constraint; raises where it cannot be had."""
        ...

    def router_names(self) -> Sequence[str]:
        """The routers that a request can ask for."""
        ...

    def expert_names(self) -> Collection[str]:
        """Every expert that can be named."""
        ...

    def experts(self) -> Sequence[ExpertStatus]:
        """Every expert, retired generations with leases included."""
        ...

    def gauges(self) -> EngineGauges:
        """A snapshot of the engine."""
        ...
