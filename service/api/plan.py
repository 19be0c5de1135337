"""Wire model → domain: which experts, which sampling, within the operator's limits. Pure, no waiting."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from service.api.backend import Backend
from service.api.wire.sampling import RoutingOptions, SamplingBody
from service.core import GenerationRequest, RoutingChoice, SamplingParams
from service.errors import (
    ContextLengthError,
    InvalidRequestError,
    LimitExceededError,
    ModelNotFoundError,
    UnknownExpertError,
)
from service.settings import Settings

SHARED = "shared"
"""The model name of the shared expert alone."""

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
    """

    prompts: Sequence[tuple[int, ...]]
    sampling: Sequence[SamplingParams]
    routing: RoutingChoice
    n: int
    priority: int = 0
    timeout: float | None = None

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
                )


def _of_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one prompt must differ, and the first must equal the same request with n = 1."""
    if choice == 0:
        return sampling
    seed = None if sampling.seed is None else (sampling.seed + choice) % _SEEDS
    # The prompt's log-probabilities are the same for all: computed once.
    return replace(sampling, seed=seed, prompt_logprobs=None)


def choose_routing(
    model: str,
    gates: dict[str, float] | None,
    options: RoutingOptions | None,
    backend: Backend,
    max_gate: float,
) -> RoutingChoice:
    """What `model`, `gates` and `routing` of a body mean together.

    Raises:
        ModelNotFoundError: `model` names nothing that is served.
        UnknownExpertError: a gate names no expert.
        LimitExceededError: more gates than experts, or a weight beyond `max_gate`.
        InvalidRequestError: the three contradict each other.
    """
    experts = set(backend.expert_names())
    routed = model == backend.bundle_name
    if not routed and model != SHARED and model not in experts:
        raise _no_model(model)
    if gates is not None and not routed:
        raise InvalidRequestError(
            f"'gates' mixes experts itself: send it with model {backend.bundle_name!r}, not {model!r}.",
            param="gates",
        )
    if options is not None and (gates is not None or not routed):
        raise InvalidRequestError(
            f"'routing' sets up the router: send it with model {backend.bundle_name!r} and without 'gates'.",
            param="routing",
        )
    if gates is not None:
        _check_gates(gates, experts, max_gate)
        return RoutingChoice(gates=gates)
    if routed:
        if options is None:
            return RoutingChoice()
        return RoutingChoice(top_k=options.top_k, threshold=options.threshold, abstain=options.abstain)
    return RoutingChoice(gates={} if model == SHARED else {model: 1.0})


@contextlib.contextmanager
def named_by(model: str, gates: Mapping[str, float] | None) -> Iterator[None]:
    """Where experts are leased: one that was retired since `choose_routing` is missed under its own field.

    Raises:
        ModelNotFoundError: `model` named it.
        UnknownExpertError: a gate named it.
    """
    try:
        yield
    except UnknownExpertError as error:
        if gates is not None:
            raise
        raise _no_model(model) from error


def _no_model(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The model {model!r} does not exist; GET /v1/models lists the names.", param="model"
    )


def _check_gates(gates: dict[str, float], experts: set[str], max_gate: float) -> None:
    if len(gates) > len(experts):
        raise LimitExceededError(
            f"'gates' names {len(gates)} experts; {len(experts)} are registered.", param="gates"
        )
    for name, weight in gates.items():
        param = f"gates.{name[:64]}"
        if name not in experts:
            raise UnknownExpertError(f"The expert {name[:64]!r} is not registered.", param=param)
        check_weight(param, weight, max_gate)


def check_weight(param: str, weight: float, max_gate: float) -> None:
    """Raise LimitExceededError for a gate beyond the operator's bound."""
    if abs(weight) > max_gate:
        raise LimitExceededError(
            f"{param} is {weight:g}; weights are limited to ±{max_gate:g} (max_gate).", param=param
        )


def check(
    body: SamplingBody, prompts: int, budget: Budget, backend: Backend, settings: Settings
) -> RoutingChoice:
    """Check everything that needs no token ids; nothing is encoded before that.

    Args:
        body: the body.
        prompts: how many prompts it has.
        budget: the tokens it asks for.
        backend: names and sizes of what is served.
        settings: the limits.

    Returns:
        Where the gates come from.

    Raises:
        TwinserveError: an unknown name, a contradiction, or a limit that the message names.
    """
    routing = choose_routing(body.model, body.gates, body.routing, backend, settings.max_gate)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("'stream_options' is for stream = true only.", param="stream_options")
    _at_most(body.n, settings.max_n, "n", "max_n")
    _at_most(prompts, settings.max_prompts, "prompt", "max_prompts")
    room = settings.max_batch + settings.max_queue
    _at_most(prompts * body.n, room, "n", "max_batch + max_queue, for prompts times n")
    _at_most(len(body.stop), settings.max_stop, "stop", "max_stop")
    _at_most(len(body.stop_token_ids), settings.max_stop, "stop_token_ids", "max_stop")
    for text in body.stop:
        _at_most(len(text), settings.max_stop_length, "stop", "max_stop_length, in characters")
    _in_vocabulary(body.stop_token_ids, backend.vocab_size, "stop_token_ids")
    _in_vocabulary(body.logit_bias, backend.vocab_size, "logit_bias")
    _at_most(body.reported or 0, settings.max_logprobs, body.reported_by, "max_logprobs")
    if body.timeout is not None and settings.max_timeout_seconds is not None:
        _at_most(body.timeout, settings.max_timeout_seconds, "timeout", "max_timeout_seconds")
    if budget.asked is not None:
        _at_most(budget.asked, settings.max_tokens, budget.param, "max_tokens")
    most = settings.max_tokens if budget.asked is None else budget.asked
    _at_most(body.min_tokens, most, "min_tokens", "max_tokens")
    return routing


def make_plan(
    body: SamplingBody,
    routing: RoutingChoice,
    budget: Budget,
    prompts: Sequence[tuple[int, ...]],
    backend: Backend,
    settings: Settings,
) -> Plan:
    """Put a checked body and its token ids together.

    Raises:
        ContextLengthError: a prompt and the tokens asked for do not fit the context.
    """
    sampling = []
    for prompt in prompts:
        room = backend.max_context - len(prompt)
        tokens = budget.asked
        if tokens is None:
            tokens = max(min(budget.default, settings.max_tokens, room), body.min_tokens)
        if tokens > room:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens and {tokens} are asked for; together they exceed the "
                f"model's context of {backend.max_context}. Shorten the prompt or lower {budget.param}.",
                param=budget.param,
            )
        sampling.append(_sampling(body, tokens))
    return Plan(
        prompts=prompts,
        sampling=sampling,
        routing=routing,
        n=body.n,
        priority=body.priority,
        timeout=settings.max_timeout_seconds if body.timeout is None else body.timeout,
    )


def _at_most(value: float, limit: float, param: str, name: str) -> None:
    if value > limit:
        raise LimitExceededError(f"{param} is {value}; the limit is {limit} ({name}).", param=param)


def _in_vocabulary(tokens: Iterable[int], size: int, param: str) -> None:
    for token in tokens:
        if token >= size:
            raise InvalidRequestError(
                f"{param}: {token} is outside the vocabulary (0 to {size - 1}).", param=param
            )


def _sampling(body: SamplingBody, max_tokens: int) -> SamplingParams:
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
    )
