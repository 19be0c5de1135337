"""The words of the server: requests, patterns, events, statistics. A leaf: imports nothing of ours but errors.

Data goes one way: wire model (api) → `GenerationRequest` → batch (scheduler, engine) → tokens → `Event`.
Nothing here knows HTTP or torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from service.errors import TwinserveError

FinishReason = Literal["stop", "length", "cancelled"]
Pooling = Literal["mean", "last"]
ConstraintKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]
StepMode = Literal["shared", "factored", "merged"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like as a whole. Plain data; `service.grammar` compiles it.

    Attributes:
        kind: how `text` is read.
            json_object: any JSON object; `text` is empty.
            json_schema: JSON that validates against the schema, which `text` holds as JSON.
            regex: what the regular expression matches from beginning to end (Rust's syntax, without
                look-around and back references; the classes d and w are ASCII).
            choice: one of the strings of a JSON list.
            grammar: what a grammar derives: Lark as llguidance reads it, from the rule `start`, with
                `%json {schema}` for embedded JSON and `<name>` for a special token; or GBNF, from `root`.
        text: the definition.
        param: the field as the client wrote it, for messages.
    """

    kind: ConstraintKind
    text: str = ""
    param: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Validated at the edge; the engine trusts it.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        min_tokens: no end-of-sequence or stop before that many.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        top_k: keep that many most likely tokens; 0 keeps all.
        min_p: drop tokens below min_p × the most likely one's probability; 0 is off.
        repetition_penalty: > 0, over prompt and generated tokens (CTRL, arXiv 1909.05858); 1 is off.
        frequency_penalty: subtracted once per generated occurrence (OpenAI).
        presence_penalty: subtracted once if generated at all (OpenAI).
        seed: >= 0, makes the request's own random stream reproducible; None draws a fresh one.
        stop: strings that end the text; not part of the answer.
        stop_token_ids: token ids that end it.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logit_bias: (token id, addition) pairs, one for a token, added before everything else (OpenAI).
        logprobs: report the chosen token's log-probability and that many likeliest ones, 0 to 20; None is off.
        prompt_logprobs: the same for every prompt token but the first; None is off.
        include_stop: what ends the text, a stop string or a stop token, is part of the answer.
        skip_special: special tokens leave no text.
        allowed_token_ids: nothing else is ever chosen; None allows all.
        bad_words: token sequences that must not come up in the answer.
        constraint: what the answer must look like. It goes before all that asks for a longer answer: the answer
            ends where the grammar does, whatever `min_tokens` and `ignore_eos` say; until then these two keep it
            from ending where it may. `max_tokens`, stop strings and stop tokens cut it. Log-probabilities stay
            the model's own.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop: bool = False
    skip_special: bool = True
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class RoutingChoice:
    """Where a request's gates come from.

    Attributes:
        gates: expert name → weight, set by the client; an empty mapping is the shared expert alone.
            None asks the router.
        top_k: keep at most that many gates of the router; None is the server's default.
        threshold: drop the router's gates below it; None is the server's default.
        abstain: let a router that can leave a strange prompt to the shared expert do so.
        temperature: divides the router's logits before both; 1 leaves them, below 1 sharpens.
        generations: expert name → the one generation of it that will do.
    """

    gates: Mapping[str, float] | None = None
    top_k: int | None = None
    threshold: float | None = None
    abstain: bool = True
    temperature: float = 1.0
    generations: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate: a domain request, limits checked.

    Attributes:
        id: unique among live requests.
        prompt_ids: at least one token id, all inside the vocabulary.
        priority: lower goes first (as in vLLM); equal ones by fair share and arrival.
        deadline: monotonic seconds at which the request fails if it has not ended; None waits for ever.
        client: whose fair share it counts against.
        leader: id of an earlier request with the same prompt and routing, whose gates and cached prompt this
            one takes over (parallel sampling); None stands alone.
        pooling: generate nothing; answer with the states after the final norm of all prompt tokens ("mean") or of
            the last one. Its gates then hold in all layers for the whole prompt.
        origin: whatever the asker wants to find in the statistics of its end.
        grammar: the compiled constraint of `sampling` (`service.grammar.Grammar`); without it the request fails.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    routing: RoutingChoice = field(default_factory=RoutingChoice)
    priority: int = 0
    deadline: float | None = None
    client: str = ""
    leader: str | None = None
    pooling: Pooling | None = None
    origin: object | None = field(default=None, repr=False, compare=False)
    grammar: object | None = field(default=None, repr=False, compare=False)

    @property
    def reads_prompt(self) -> bool:
        """Something is wanted of every prompt token, so that none may come from the prefix cache."""
        return self.sampling.prompt_logprobs is not None or self.pooling == "mean"


@dataclass(frozen=True, slots=True, order=True)
class ExpertKey:
    """One immutable generation of one expert."""

    name: str
    generation: int

    def __str__(self) -> str:
        return f"{self.name}@{self.generation}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A routing pattern: gates after top-k and quantisation, in name order; hashable.

    The empty pattern is the shared expert alone.
    """

    gates: tuple[tuple[ExpertKey, float], ...] = ()

    @property
    def experts(self) -> frozenset[ExpertKey]:
        """The generations that this pattern needs."""
        return frozenset(key for key, _ in self.gates)

    def __str__(self) -> str:
        return "+".join(f"{key}:{weight:g}" for key, weight in self.gates) or "shared"


@dataclass(frozen=True, slots=True)
class RoutingOutcome:
    """What made an answer; every answer carries it.

    Attributes:
        gates: expert name → weight that was added to the shared expert.
        pattern: the pattern's text form.
        mode: "shared" (no gates), "factored", or "merged" where materialised weights made most tokens.
        generations: expert name → generation used.
        router_generation: None where the client named the gates.
        confidence: the router's largest calibrated probability; None where it was not asked.
        scores: every expert's calibrated probability before top-k and threshold; empty where not asked.
        abstained: the router left the prompt to the shared expert, as unlike what it knows.
        explored: another expert than the best known one, to learn of it from feedback.
        trial: the generation whose canary this request was; None for all others.
        decision: what feedback needs to learn from a rating; None without feedback.
    """

    gates: Mapping[str, float]
    pattern: str
    mode: StepMode
    generations: Mapping[str, int]
    router_generation: int | None = None
    confidence: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    abstained: bool = False
    explored: bool = False
    trial: ExpertKey | None = None
    decision: object | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one sequence.

    Attributes:
        cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution before temperature and cuts.

    Attributes:
        token: the chosen token id, or the prompt's.
        logprob: its natural logarithm of probability.
        rank: how many tokens are likelier, plus 1.
        top: the likeliest tokens and theirs, likeliest first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a running request: whole characters only, stop strings already cut.

    `text` can be empty while a character is incomplete or a stop string may be starting, and where the token
    ends the answer. `logprobs` has one entry for each of `token_ids` where the request asked for them. `routing`
    comes with a request's first token.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    routing: RoutingOutcome | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The one terminal event of a request that ended well or was cancelled.

    Attributes:
        pooled: float32 values of the pooled state, where the request asked for it and was not cancelled.
    """

    reason: FinishReason
    usage: Usage
    routing: RoutingOutcome | None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    pooled: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The one terminal event of a request that ended in an error of its own or of the engine."""

    error: TwinserveError


Event = TextDelta | Finished | Failed


@dataclass(frozen=True, slots=True)
class ExpertStatus:
    """One expert as operators see it.

    Attributes:
        state: active: the one that its name stands for; trial: a share of the routed requests, or who names the
            generation, gets it; staged: nobody but who names the generation; retired: only running requests.
        routed: the router can choose it; otherwise it serves by name or gates only.
        leases: live requests that use this generation.
        nbytes: true bytes of its factors in memory; an estimate for one that never was.
        resident: its factors are on the device.
    """

    name: str
    generation: int
    state: Literal["active", "trial", "staged", "retired"]
    routed: bool
    leases: int
    nbytes: int
    max_rank: int
    resident: bool = True


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Times of one ended request, seconds on the monotonic clock; None where a stage was not reached.

    Attributes:
        generations: expert name → generation used.
        trial: the generation whose canary it was.
        leads: it was the first choice of its prompt, which counts once.
        origin: as the request had it.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float | None
    route_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    first_token_seconds: float | None
    total_seconds: float
    gates: Mapping[str, float]
    abstained: bool = False
    generations: Mapping[str, int] = field(default_factory=dict)
    trial: ExpertKey | None = None
    leads: bool = True
    origin: object | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ShadowStats:
    """A shadow's gates beside those that were used, of one request.

    Attributes:
        agree: the same expert weighs most in both, or neither has any.
        difference: mean absolute difference over the experts that either names.
    """

    key: ExpertKey
    agree: bool
    difference: float


@dataclass(frozen=True, slots=True)
class RouteStats:
    """What the router made of one real request.

    Attributes:
        confidence: its largest probability.
        distance: how unlike the router's own held-out prompts it is, in spreads from their median: of those half
            lie below 0 and 5 % above 1. None where the router has no such statistics, or needed no look.
        trial: the canary that it belongs to.
        shadow: None where no shadow looked on.
    """

    confidence: float
    abstained: bool
    distance: float | None = None
    trial: ExpertKey | None = None
    shadow: ShadowStats | None = None


@dataclass(frozen=True, slots=True)
class RouterBaseline:
    """What the current router was fitted to expect, to compare its requests with.

    Attributes:
        generation: of the router.
        abstention: share of prompts like those that it was fitted on which it leaves to the shared expert; None
            for one that never does.
        threshold: the distance from which on it abstains; None as well.
        accuracy: share of its own held-out prompts that it sent to their expert; None where it does not say.
    """

    generation: int
    experts: int
    abstention: float | None = None
    threshold: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did.

    Attributes:
        routes: of the real requests that were routed since the last step.
    """

    mode: StepMode
    seconds: float
    decode_rows: int
    prefill_tokens: int
    generated_tokens: int
    active_experts: int
    patterns: int
    rebuilt: bool
    inter_token_seconds: tuple[float, ...]
    routed_requests: int = 0
    route_seconds: float = 0.0
    preemptions: int = 0
    routes: tuple[RouteStats, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """A snapshot for gauges, and totals that others keep.

    Attributes:
        kv_blocks_used: blocks that sequences own; `kv_blocks_cached` hold findable prefixes beside those.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found.
        expert_loads, expert_evictions: experts that came into a slot or lost it.
        expert_hits, expert_misses: experts of queued requests that had a slot, or had none.
        merged_bytes: materialised weights held.
        experts_staged: generations beside the current ones: staged, or tried out.
        router: what the current one was fitted to expect; None without one.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    prefix_queries: int
    prefix_hits: int
    experts_registered: int
    experts_resident: int
    expert_loads: int
    expert_evictions: int
    expert_hits: int
    expert_misses: int
    merged_bytes: int
    alive: bool
    experts_staged: int = 0
    router: RouterBaseline | None = None
