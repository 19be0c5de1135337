"""`/v1/chat/completions`: a template in front of the same path."""

from fastapi import APIRouter, Request, Response

from service.api.backend import Backend
from service.api.errors import GENERATING
from service.api.generate import answer
from service.api.plan import Budget, check, make_plan
from service.api.prompts import PromptEncoder
from service.api.shapes import ChatShape
from service.api.tokens import TokenTexts
from service.api.wire.answers import Generated
from service.api.wire.chat import ChatBody
from service.errors import InvalidRequestError, LimitExceededError
from service.settings import Settings


def _budget(body: ChatBody, default: int) -> Budget:
    """OpenAI's newer name and the older one; both only if they agree."""
    if body.max_completion_tokens is None:
        return Budget(body.max_tokens, "max_tokens", default)
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequestError(
            "'max_tokens' and 'max_completion_tokens' differ; send one of them.",
            param="max_completion_tokens",
        )
    return Budget(body.max_completion_tokens, "max_completion_tokens", default)


def add_routes(
    router: APIRouter, backend: Backend, settings: Settings, encoder: PromptEncoder, texts: TokenTexts
) -> None:
    """Put `POST /v1/chat/completions` on `router`."""

    @router.post("/v1/chat/completions", response_model=Generated, responses=GENERATING)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Write the assistant's next turn."""
        budget = _budget(body, settings.default_chat_tokens)
        routing = check(body, 1, budget, backend, settings)
        if len(body.messages) > settings.max_messages:
            raise LimitExceededError(
                f"messages has {len(body.messages)} items; the limit is {settings.max_messages} "
                "(max_messages).",
                param="messages",
            )
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequestError("'top_logprobs' is for logprobs = true only.", param="top_logprobs")
        prompt = await encoder.chat(body.messages)
        plan = make_plan(body, routing, budget, [prompt], backend, settings)
        shape = ChatShape(texts, scored=body.logprobs)
        return await answer(request, body, plan, shape, backend, settings)
