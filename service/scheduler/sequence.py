"""One request as the scheduler sees it: integers only."""

from dataclasses import dataclass, field

from service.core import GenerationRequest, Pattern


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way through WAITING → ROUTING → PREFILL → DECODE.

    Attributes:
        request: what the client asked.
        tokens: prompt, then generated ids.
        pattern: its gates; None until the router has spoken (routing fills it).
        row: KV row; None until admitted (the scheduler fills it).
        computed: how many leading tokens have their keys and values in the cache (the engine advances it).
    """

    request: GenerationRequest
    pattern: Pattern | None = None
    tokens: list[int] = field(default_factory=list)
    row: int | None = None
    computed: int = 0

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt_ids)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def in_prefill(self) -> bool:
        """Part of the prompt is not in the cache yet."""
        return self.computed < self.prompt_length
