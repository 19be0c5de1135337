"""`/v1/chat/completions`: a template in front of the same path, and calls of tools behind it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from fastapi import APIRouter, Request, Response

from service.api.bounds import at_most_items, kept_tokens
from service.api.call_reader import CallReader
from service.api.calling import CallStyle, call_style
from service.api.chat_shape import ChatShape
from service.api.compat.adapters import with_lora
from service.api.generate import answer
from service.api.parts import Parts
from service.api.plan import Budget, Plan, check, make_plan
from service.api.refusals import ANSWERED, GENERATING
from service.api.shapes import Telling
from service.api.template import Rendering
from service.api.wire.chat import ChatBody, TemplatedChat
from service.api.wire.documented import ChatAnswer
from service.core import Constraint
from service.errors import InvalidRequestError


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


def _reader(body: ChatBody, style: CallStyle | None) -> Callable[[], CallReader] | None:
    """Makes what finds the calls of one choice."""
    if style is None:
        return None
    return partial(style.reader, body.tools, parallel=body.parallel_tool_calls)


def _demand(body: ChatBody, style: CallStyle | None, *, special: bool) -> Constraint | None:
    """What an answer must look like that has to call a tool."""
    if style is None or not body.demanded:
        return None
    if body.constraint() is not None:
        raise InvalidRequestError(
            "tool_choice demands a call, and an answer cannot have another format too; send one of them.",
            param="tool_choice",
        )
    several = body.parallel_tool_calls and body.tool_choice == "required"
    grammar = style.grammar(body.demanded, special=special, parallel=several)
    return Constraint("grammar", grammar, param="tools")


def rendering(body: TemplatedChat, *, special: bool = False) -> Rendering:
    """How a body's chat becomes text."""
    opened = body.add_generation_prompt
    return Rendering(
        tools=[tool.described() for tool in body.tools],
        opened=not body.continue_final_message if opened is None else opened,
        continued=body.continue_final_message,
        variables=body.chat_template_kwargs,
        special=special,
    )


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A body that has been decided.

    Attributes:
        body: as it came, but for what has become something else in it.
        telling: what the answer carries besides its text.
        reader: makes what finds calls of tools in a choice; None looks for none.
    """

    body: ChatBody
    plan: Plan
    telling: Telling
    reader: Callable[[], CallReader] | None


async def prepare(body: ChatBody, parts: Parts) -> PreparedChat:
    """Check a body, render its chat and plan its choices.

    Raises:
        TwinserveError: refused, under the field at fault.
    """
    backend, settings, encoder = parts.backend, parts.settings, parts.encoder
    body = await with_lora(body, parts)
    budget = _budget(body, settings.default_chat_tokens)
    routing = await check(body, 1, budget, backend, settings, parts.naming)
    at_most_items(len(body.messages), settings.max_messages, "messages", "max_messages")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("'top_logprobs' is for logprobs = true only.", param="top_logprobs")
    keep = kept_tokens(body, budget.asked, backend, settings)
    how = rendering(body, special=body.add_special_tokens)
    if not body.calls and how.tools and not encoder.template.shows_tools():
        # Agents send their tools along even where none may be called.
        how = replace(how, tools=[])
    prompt = await encoder.chat(body.messages, how=how, keep=keep)
    telling = Telling.of(body)
    style = call_style(encoder.template.text(tools=True)) if body.calls else None
    marked = style is not None and parts.texts.names_special(style.opens)
    if marked:
        # The marks around calls must come through, to be found.
        body = body.model_copy(update={"skip_special_tokens": False})
    bad_words = encoder.sequences(body.bad_words)
    demand = _demand(body, style, special=marked)
    plan = make_plan(body, routing, budget, [prompt], backend, settings, bad_words, demand)
    return PreparedChat(body, plan, telling, _reader(body, style))


def add_routes(router: APIRouter, parts: Parts) -> None:
    """Put `POST /v1/chat/completions` on `router`."""

    @router.post("/v1/chat/completions", response_model=ChatAnswer, responses=ANSWERED | GENERATING)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Write the assistant's next turn."""
        chat = await prepare(body, parts)
        shape = ChatShape(parts.texts, chat.plan.prompts[0], chat.telling, chat.reader)
        return await answer(request, chat.body, chat.plan, shape, parts.backend, parts.settings)
