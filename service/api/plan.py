"""Wire model → domain: which sampling, how many tokens, which requests. Checks names, bounds and room first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from service.api.backend import Backend
from service.api.bounds import at_most, check_bounds, check_words
from service.api.naming import Naming
from service.api.wire.sampling import SamplingBody
from service.core import Constraint, GenerationRequest, RoutingChoice, SamplingParams
from service.errors import ContextLengthError
from service.settings import Settings

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's `max_tokens` of a completion that names none."""

_SEEDS = 2**64
"""Seeds of the engine lie below it: as many as there are 64-bit integers on the wire."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The tokens that a body asks for.

    Attributes:
        asked: by the body; None asks for nothing in particular.
        param: the field that it asked with.
        default: where it did not ask; cut to what fits.
    """

    asked: int | None
    param: str
    default: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One body, decided.

    Attributes:
        prompts: token ids; each is generated `n` times.
        sampling: of the first choice of each prompt; the further ones differ in their seed.
        timeout: seconds from arrival in which all of it must end; None is for ever.
        prompt_only: nothing is to be generated; the one token that has to be is told to nobody.
        grammar: the compiled constraint of `sampling`, once there is one.
    """

    prompts: Sequence[tuple[int, ...]]
    sampling: Sequence[SamplingParams]
    routing: RoutingChoice
    n: int
    priority: int = 0
    timeout: float | None = None
    prompt_only: bool = False
    grammar: object | None = None

    async def compiled(self, backend: Backend) -> "Plan":
        """The same with its grammar, which must be there before its requests are made.

        Raises:
            InvalidRequestError: the constraint is malformed, unsupported, or beyond a limit.
            QueueFullError: too many others wait to be compiled.
        """
        constraint = self.sampling[0].constraint
        if constraint is None:
            return self
        return replace(self, grammar=await backend.compile(constraint))

    def requests(self, answer_id: str, client: str, arrived: float) -> Iterator[GenerationRequest]:
        """One domain request a choice, prompt by prompt; each prompt's first choice leads the others.

        Args:
            answer_id: of the whole answer.
            client: whose fair share it counts against.
            arrived: monotonic seconds.
        """
        deadline = None if self.timeout is None else arrived + self.timeout
        for index, (prompt, sampling) in enumerate(zip(self.prompts, self.sampling, strict=True)):
            for choice in range(self.n):
                yield GenerationRequest(
                    id=f"{answer_id}-{index * self.n + choice}",
                    prompt_ids=prompt,
                    sampling=_of_choice(sampling, choice),
                    routing=self.routing,
                    priority=self.priority,
                    deadline=deadline,
                    client=client,
                    leader=f"{answer_id}-{index * self.n}" if choice else None,
                    grammar=self.grammar,
                )


def _of_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one prompt must differ, and the first must equal the same request with n = 1."""
    if choice == 0:
        return sampling
    seed = None if sampling.seed is None else (sampling.seed + choice) % _SEEDS
    # The prompt's log-probabilities are the same for all: computed once.
    return replace(sampling, seed=seed, prompt_logprobs=None)


async def check(
    body: SamplingBody, prompts: int, budget: Budget, backend: Backend, settings: Settings, naming: Naming
) -> RoutingChoice:
    """Check everything that needs no token ids; nothing is encoded before that.

    Args:
        body: the body.
        prompts: how many prompts it has.
        budget: the tokens it asks for.
        backend: sizes of what is served.
        settings: the limits.
        naming: finds what its names mean.

    Returns:
        Where the gates come from.

    Raises:
        TwinserveError: an unknown name, a contradiction, or a limit that the message names.
    """
    routing = await naming.choose(body.model, body.gates, body.routing)
    check_bounds(body, prompts, backend, settings)
    if budget.asked is not None:
        at_most(budget.asked, settings.max_tokens, budget.param, "max_tokens")
    most = settings.max_tokens if budget.asked is None else budget.asked
    at_most(body.min_tokens, most, "min_tokens", "max_tokens")
    return routing


def make_plan(
    body: SamplingBody,
    routing: RoutingChoice,
    budget: Budget,
    prompts: Sequence[tuple[int, ...]],
    backend: Backend,
    settings: Settings,
    bad_words: tuple[tuple[int, ...], ...] = (),
    constraint: Constraint | None = None,
) -> Plan:
    """Put a checked body and its token ids together; a `constraint` goes before the body's own.

    Raises:
        InvalidRequestError: `bad_words`, the body's as token ids, leave nothing to choose.
        ContextLengthError: a prompt and the tokens asked for do not fit the context.
    """
    check_words(body, bad_words)
    sampling = []
    for prompt in prompts:
        room = backend.max_context - len(prompt)
        tokens = budget.asked
        if tokens == 0:
            tokens = 1
        if tokens is None:
            tokens = max(min(budget.default, settings.max_tokens, room), body.min_tokens)
        if tokens > room:
            param = "min_tokens" if budget.asked is None else budget.param
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens and {tokens} are asked for; together they exceed the "
                f"model's context of {backend.max_context}. Shorten the prompt or lower {param}.",
                param=param,
            )
        sampling.append(_sampling(body, tokens, bad_words, constraint or body.constraint()))
    return Plan(
        prompts=prompts,
        sampling=sampling,
        routing=routing,
        n=body.n,
        priority=body.priority,
        timeout=settings.max_timeout_seconds if body.timeout is None else body.timeout,
        prompt_only=budget.asked == 0,
    )


def _sampling(
    body: SamplingBody,
    max_tokens: int,
    bad_words: tuple[tuple[int, ...], ...],
    constraint: Constraint | None,
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        # One to one; a generator that is seeded with -1 and with 1 would give the same stream.
        seed=None if body.seed is None else body.seed % _SEEDS,
        stop=body.stop,
        stop_token_ids=frozenset(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logit_bias=tuple(body.logit_bias.items()),
        logprobs=body.reported,
        prompt_logprobs=body.prompt_reported,
        include_stop=body.include_stop_str_in_output,
        skip_special=body.skip_special_tokens,
        allowed_token_ids=body.allowed_token_ids,
        bad_words=bad_words,
        constraint=constraint,
    )
