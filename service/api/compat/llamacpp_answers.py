"""Tells the events of a request to `/completion` as llama.cpp does."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from service.api.compat.running import CompatBody, Pieces
from service.api.compat.wire.llamacpp import (
    SAMPLERS,
    LlamaAnswer,
    LlamaBody,
    LlamaPiece,
    Probability,
    Timings,
    TokenProbability,
)
from service.api.parts import Parts
from service.api.plan import Plan
from service.api.scores import IMPOSSIBLE
from service.api.tokens import TokenTexts
from service.api.wire.answers import RoutingAnswer
from service.core import Finished, TextDelta, TokenLogprobs


def settings_of(body: LlamaBody, wanted: CompatBody, parts: Parts) -> dict[str, Any]:
    """What a completion runs with, in llama.cpp's words."""
    numbers = {name: number for number, name in parts.ids.current().items()}
    gates = wanted.gates or {}
    return {
        "seed": wanted.seed,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repeat_last_n": -1,
        "repeat_penalty": body.repeat_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "stop": list(body.stop),
        "n_predict": body.n_predict,
        "max_tokens": body.n_predict,
        "ignore_eos": body.ignore_eos,
        "stream": body.stream,
        "logit_bias": [{"token": token, "bias": bias} for token, bias in body.logit_bias],
        "n_probs": body.n_probs,
        "samplers": SAMPLERS,
        "grammar": body.grammar,
        "lora": [{"id": numbers[name], "scale": scale} for name, scale in gates.items() if name in numbers],
        "n_ctx": parts.backend.max_context,
        "model": wanted.model,
    }


@dataclass(slots=True)
class _Choice:
    """One choice, as far as it has come."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)
    first: float | None = None


class Answering:
    """The events of one request.

    Args:
        arrived: monotonic seconds.
        body: as the client wrote it.
        wanted: the same in our words.
    """

    def __init__(self, arrived: float, body: LlamaBody, wanted: CompatBody, plan: Plan, parts: Parts) -> None:
        self._arrived = arrived
        self._body = body
        self._wanted = wanted
        self._plan = plan
        self._parts = parts
        self._choices: dict[int, _Choice] = {}

    async def whole(self, pieces: Pieces) -> bytes:
        """One object, or a list of them for several choices."""
        answers: dict[int, LlamaAnswer] = {}
        async for index, event in pieces:
            if isinstance(event, TextDelta):
                self._take(index, event)
            else:
                answers[index] = self._end(index, event)
        told = [answers[index].dump() for index in sorted(answers)]
        return b"[" + b",".join(told) + b"]" if len(self._plan.prompts) * self._plan.n > 1 else told[0]

    async def chunks(self, pieces: Pieces) -> AsyncIterator[bytes]:
        """A chunk a token, then one without content that says how it ended."""
        async for index, event in pieces:
            if isinstance(event, TextDelta):
                choice = self._take(index, event)
                if self._plan.prompt_only:
                    continue
                yield LlamaPiece(
                    index=index,
                    content=event.text,
                    tokens=list(event.token_ids),
                    tokens_predicted=len(choice.tokens),
                    tokens_evaluated=len(self._plan.prompts[index // self._plan.n]),
                    completion_probabilities=self._told(event.logprobs),
                ).dump()
            else:
                yield self._end(index, event).dump()

    def _take(self, index: int, event: TextDelta) -> _Choice:
        choice = self._choices.setdefault(index, _Choice())
        choice.first = choice.first or time.monotonic()
        if self._plan.prompt_only:
            return choice
        choice.text.append(event.text)
        choice.tokens += event.token_ids
        choice.scores += event.logprobs
        return choice

    def _end(self, index: int, end: Finished) -> LlamaAnswer:
        choice = self._choices.setdefault(index, _Choice())
        text, streamed = "".join(choice.text), self._body.stream
        word = end.stop_reason if isinstance(end.stop_reason, str) else ""
        kind: Literal["limit", "word", "eos"] = (
            "limit" if end.reason == "length" else "word" if word else "eos"
        )
        return LlamaAnswer(
            index=index,
            content="" if streamed else text,
            tokens=choice.tokens if self._body.return_tokens and not streamed else [],
            model=self._wanted.model,
            tokens_predicted=len(choice.tokens),
            tokens_evaluated=end.usage.prompt_tokens,
            generation_settings=settings_of(self._body, self._wanted, self._parts),
            prompt=self._parts.texts.text_of_prompt(self._plan.prompts[index // self._plan.n]),
            has_new_line="\n" in text,
            stop_type=kind,
            stopping_word=word,
            tokens_cached=end.usage.cached_tokens,
            timings=self._timings(choice, end),
            completion_probabilities=None if streamed else self._told(choice.scores),
            routing=None if end.routing is None else RoutingAnswer.of(end.routing),
        )

    def _timings(self, choice: _Choice, end: Finished) -> Timings:
        now = time.monotonic()
        first = choice.first or now
        fresh, made = end.usage.prompt_tokens - end.usage.cached_tokens, len(choice.tokens)
        waited, decoded = 1000 * (first - self._arrived), 1000 * (now - first)
        return Timings(
            cache_n=end.usage.cached_tokens,
            prompt_n=fresh,
            prompt_ms=waited,
            prompt_per_token_ms=waited / fresh if fresh else None,
            prompt_per_second=1000 * fresh / waited if waited else None,
            predicted_n=made,
            predicted_ms=decoded,
            predicted_per_token_ms=decoded / made if made else None,
            predicted_per_second=1000 * made / decoded if decoded else None,
        )

    def _told(self, scores: Sequence[TokenLogprobs]) -> list[TokenProbability] | None:
        if not self._body.n_probs or not scores:
            return None
        texts = self._parts.texts
        return [
            TokenProbability(
                **_probability(texts, score.token, score.logprob),
                top_logprobs=[Probability(**_probability(texts, *one)) for one in score.top],
            )
            for score in scores
        ]


def _probability(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    raw = texts.bytes_of(token)
    return {
        "id": token,
        "token": raw.decode(errors="ignore"),
        "bytes": list(raw),
        "logprob": max(logprob, IMPOSSIBLE),
    }
