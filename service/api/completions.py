"""`/v1/completions`."""

from fastapi import APIRouter, Request, Response

from service.api.bounds import kept_tokens
from service.api.compat.adapters import with_lora
from service.api.completion_shape import CompletionShape, Echo
from service.api.generate import answer
from service.api.parts import Parts
from service.api.plan import DEFAULT_COMPLETION_TOKENS, Budget, check, make_plan
from service.api.refusals import ANSWERED, GENERATING
from service.api.shapes import Telling
from service.api.wire.completions import CompletionBody
from service.api.wire.documented import CompletionAnswer


def add_routes(router: APIRouter, parts: Parts) -> None:
    """Put `POST /v1/completions` on `router`."""
    backend, settings, encoder, texts = parts.backend, parts.settings, parts.encoder, parts.texts

    @router.post("/v1/completions", response_model=CompletionAnswer, responses=ANSWERED | GENERATING)
    async def complete(request: Request, body: CompletionBody) -> Response:
        """Continue one or more prompts."""
        body = await with_lora(body, parts)
        budget = Budget(body.max_tokens, "max_tokens", DEFAULT_COMPLETION_TOKENS)
        routing = await check(body, len(body.prompt), budget, backend, settings, parts.naming)
        keep = kept_tokens(body, budget.asked, backend, settings)
        prompts = await encoder.prompts(body.prompt, special=body.add_special_tokens, keep=keep)
        bad_words = encoder.sequences(body.bad_words)
        plan = make_plan(body, routing, budget, prompts, backend, settings, bad_words)
        echo = None
        if body.echo:
            echoed = [
                item if isinstance(item, str) and keep is None else texts.text_of_prompt(tokens)
                for item, tokens in zip(body.prompt, prompts, strict=True)
            ]
            echo = Echo(echoed, body.echoed, alone=plan.prompt_only)
        shape = CompletionShape(texts, prompts, Telling.of(body), echo, body.n)
        return await answer(request, body, plan, shape, backend, settings)
