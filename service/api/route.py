"""`/v1/route`: the router's word, without generating."""

from fastapi import APIRouter, Request, Response

from service.api.backend import Backend
from service.api.bounds import at_most_items
from service.api.generation import while_connected
from service.api.headers import routing_headers
from service.api.naming import Naming, named_by
from service.api.prompts import PromptEncoder
from service.api.refusals import ROUTING
from service.api.wire.answers import RouteAnswer, RouteChoice, RoutingAnswer
from service.api.wire.routing import RouteBody
from service.settings import Settings


def add_routes(
    router: APIRouter, backend: Backend, settings: Settings, encoder: PromptEncoder, naming: Naming
) -> None:
    """Put `POST /v1/route` on `router`."""

    async def encode(body: RouteBody) -> list[tuple[int, ...]]:
        if body.prompt is not None:
            return await encoder.prompts(body.prompt)
        chats = body.messages or []
        names = ["messages"] if len(chats) == 1 else [f"messages[{index}]" for index in range(len(chats))]
        for name, chat in zip(names, chats, strict=True):
            at_most_items(len(chat), settings.max_messages, name, "max_messages")
        return [await encoder.chat(chat, name) for name, chat in zip(names, chats, strict=True)]

    @router.post("/v1/route", response_model=RouteAnswer, responses=ROUTING)
    async def route(request: Request, body: RouteBody) -> Response:
        """Tell which experts would answer, with which weights and why."""
        model = body.model or backend.bundle_name
        choice = await naming.choose(model, None, body.routing)
        param = "messages" if body.prompt is None else "prompt"
        at_most_items(len(body.prompt or body.messages or ()), settings.max_prompts, param, "max_prompts")
        prompts = await encode(body)
        with named_by(model, None):
            outcomes = await while_connected(request, backend.route(prompts, choice))
        tokens = sum(len(prompt) for prompt in prompts)
        answer = RouteAnswer(
            model=model,
            data=[
                RouteChoice(**dict(RoutingAnswer.of(outcome)), index=index, scores=outcome.scores)
                for index, outcome in enumerate(outcomes)
            ],
            usage={"prompt_tokens": tokens, "total_tokens": tokens},
        )
        headers = routing_headers(outcomes)
        return Response(answer.dump(), media_type="application/json", headers=headers)
