"""The operator's limits and the model's vocabulary, held against a body: everything that needs no token ids."""

from collections.abc import Iterable

from service.api.backend import Backend
from service.api.wire.sampling import SamplingBody
from service.errors import ContextLengthError, InvalidRequestError, LimitExceededError
from service.settings import Settings


def at_most(value: float, limit: float, param: str, name: str) -> None:
    """Raise LimitExceededError for a value beyond a limit; `name` is the setting's."""
    if value > limit:
        raise LimitExceededError(f"{param} is {value}; the limit is {limit} ({name}).", param=param)


def at_most_items(count: int, limit: int, param: str, name: str) -> None:
    """The same for how many items a field has."""
    if count > limit:
        raise LimitExceededError(f"{param} has {count} items; the limit is {limit} ({name}).", param=param)


def check_bounds(body: SamplingBody, prompts: int, backend: Backend, settings: Settings) -> None:
    """Raise for the first field that is beyond a limit or contradicts another.

    Args:
        body: the body.
        prompts: how many prompts it has.
        backend: the vocabulary of what is served.
        settings: the limits.

    Raises:
        InvalidRequestError: names the field and the mend.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("'stream_options' is for stream = true only.", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError(
            "'prompt_logprobs' come with a whole answer only; send stream = false.", param="prompt_logprobs"
        )
    at_most(body.n, settings.max_n, "n", "max_n")
    at_most(prompts, settings.max_prompts, "prompt", "max_prompts")
    room = settings.max_batch + settings.max_queue
    at_most(prompts * body.n, room, "n", "max_batch + max_queue, for prompts times n")
    at_most(len(body.stop), settings.max_stop, "stop", "max_stop")
    at_most(len(body.stop_token_ids), settings.max_stop, "stop_token_ids", "max_stop")
    for text in body.stop:
        at_most(len(text), settings.max_stop_length, "stop", "max_stop_length, in characters")
    _in_vocabulary(body.stop_token_ids, backend.vocab_size, "stop_token_ids")
    _in_vocabulary(body.logit_bias, backend.vocab_size, "logit_bias")
    _in_vocabulary(body.allowed_token_ids or (), backend.vocab_size, "allowed_token_ids")
    at_most(body.reported or 0, settings.max_logprobs, body.reported_by, "max_logprobs")
    at_most(body.prompt_logprobs or 0, settings.max_logprobs, "prompt_logprobs", "max_logprobs")
    if body.timeout is not None and settings.max_timeout_seconds is not None:
        at_most(body.timeout, settings.max_timeout_seconds, "timeout", "max_timeout_seconds")


def check_words(body: SamplingBody, bad_words: tuple[tuple[int, ...], ...]) -> None:
    """Raise InvalidRequestError if bad words forbid all that is allowed."""
    alone = {word[0] for word in bad_words if len(word) == 1}
    if body.allowed_token_ids is not None and alone >= set(body.allowed_token_ids):
        raise InvalidRequestError(
            "allowed_token_ids: every one of them is a bad word, so that no token is left.",
            param="allowed_token_ids",
        )


def kept_tokens(body: SamplingBody, asked: int | None, backend: Backend, settings: Settings) -> int | None:
    """How many tokens of a prompt's end `truncate_prompt_tokens` keeps; None keeps all.

    Args:
        body: the body.
        asked: tokens to generate, if it says how many.
        backend: the context.
        settings: the limit of a prompt.

    Raises:
        ContextLengthError: more than fit.
    """
    return kept_end(body.truncate_prompt_tokens, asked or max(body.min_tokens, 1), backend, settings)


def kept_end(truncate: int | None, answer: int, backend: Backend, settings: Settings) -> int | None:
    """The same for any body.

    Args:
        truncate: the field's value.
        answer: tokens that must fit behind the prompt.
        backend: the context.
        settings: the limit of a prompt.

    Raises:
        ContextLengthError: more than fit.
    """
    if truncate is None:
        return None
    most = backend.max_context - 1
    if settings.max_prompt_tokens is not None:
        most = min(most, settings.max_prompt_tokens)
    if truncate > most:
        raise ContextLengthError(
            f"truncate_prompt_tokens is {truncate}; a prompt of this model has at most {most} "
            "tokens. Send less, or -1 to keep what fits.",
            param="truncate_prompt_tokens",
        )
    if truncate > 0:
        return truncate
    return max(1, min(most, backend.max_context - answer))


def _in_vocabulary(tokens: Iterable[int], size: int, param: str) -> None:
    for token in tokens:
        if token >= size:
            raise InvalidRequestError(
                f"{param}: {token} is outside the vocabulary (0 to {size - 1}).", param=param
            )
