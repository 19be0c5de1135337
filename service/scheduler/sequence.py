"""One request as the scheduler sees it: integers only."""

from dataclasses import dataclass, field

from service.core import GenerationRequest, Pattern


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way through WAITING → PREFILL → DECODE, and back to WAITING if it is preempted.

    Attributes:
        request: what the client asked.
        pattern: its gates. None until the router has spoken: before `add`, or in the middle of a single-pass
            prefill (the engine fills it).
        single_pass: in its prompt the gates begin at a middle layer; its answer has them everywhere.
        tokens: prompt, then generated ids (the engine appends).
        tables: for each KV group the block of tokens [16·i, 16·i + 16) at index i, the null block where no
            layer of the group looks any more; empty unless admitted (the scheduler fills it).
        computed: how many leading tokens have their keys and values in the cache (the scheduler advances it).
        cached: how many prompt tokens the last admission found in the prefix cache.
        preemptions: how often it had to give everything back.
        rank: (priority, arrival number): first come, first served within a priority (the scheduler sets it).
        root: digest of everything but tokens that keys and values depend on; empty until the pattern is known.
        chain: digests of its leading whole blocks, as far as anybody has asked.
        shareable: its blocks may be found by others, and it may find others'.
    """

    request: GenerationRequest
    pattern: Pattern | None = None
    single_pass: bool = False
    tokens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    preemptions: int = 0
    rank: tuple[int, int] = (0, 0)
    root: bytes = field(default=b"", repr=False)
    chain: list[bytes] = field(default_factory=list, repr=False)
    shareable: bool = True

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
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.computed

    @property
    def in_prefill(self) -> bool:
        """More is pending than the one token that was sampled last."""
        return len(self.tokens) - self.computed > 1 or len(self.tokens) == len(self.request.prompt_ids)

    @property
    def unrouted(self) -> bool:
        """Its gates will be found in the middle of its first prefill, which must hold the whole prompt."""
        return self.single_pass and self.pattern is None
