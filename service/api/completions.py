"""`/v1/completions`."""

from fastapi import APIRouter, Request, Response

from service.api.backend import Backend
from service.api.errors import GENERATING
from service.api.generate import answer
from service.api.plan import DEFAULT_COMPLETION_TOKENS, Budget, check, make_plan
from service.api.prompts import PromptEncoder
from service.api.shapes import CompletionShape
from service.api.tokens import TokenTexts
from service.api.wire.answers import Generated
from service.api.wire.completions import CompletionBody
from service.settings import Settings


def add_routes(
    router: APIRouter, backend: Backend, settings: Settings, encoder: PromptEncoder, texts: TokenTexts
) -> None:
    """Put `POST /v1/completions` on `router`."""

    @router.post("/v1/completions", response_model=Generated, responses=GENERATING)
    async def complete(request: Request, body: CompletionBody) -> Response:
        """Continue one or more prompts."""
        budget = Budget(body.max_tokens, "max_tokens", DEFAULT_COMPLETION_TOKENS)
        routing = check(body, len(body.prompt), budget, backend, settings)
        prompts = await encoder.prompts(body.prompt)
        plan = make_plan(body, routing, budget, prompts, backend, settings)
        echo = [
            (item if isinstance(item, str) else texts.text_of_prompt(item), ids)
            for item, ids in zip(body.prompt, prompts, strict=True)
            if body.echo
        ]
        shape = CompletionShape(texts, scored=body.reported is not None, echo=echo, n=body.n)
        return await answer(request, body, plan, shape, backend, settings)
