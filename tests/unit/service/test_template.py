"""Chat templates: what they are asked, what they may not do, and that a slow one holds up nobody."""

import asyncio
import threading
import time
from typing import Any

import pytest

from service.api.template import ChatTemplate, Rendering
from service.errors import InvalidRequestError
from tests.unit.service.backend import Letters

SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
SAID = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "so "}


def template(text: Any, seconds: float = 10) -> ChatTemplate:
    tokenizer = Letters()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, seconds)


def render(text: Any, *turns: dict[str, Any], **how: Any) -> str:
    async def work() -> str:
        return await template(text).render(list(turns) or [USER], Rendering(**how), "messages")

    return asyncio.run(work())


def refusal(text: Any, *turns: dict[str, Any], **how: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        render(text, *turns, **how)
    return caught.value


def test_a_template_that_never_ends_is_stopped_and_the_loop_goes_on() -> None:
    async def work() -> tuple[int, InvalidRequestError]:
        asked = asyncio.ensure_future(template(SPIN, 0.5).render([USER], Rendering(), "messages"))
        turns = 0
        while not asked.done():
            await asyncio.sleep(0.01)
            turns += 1
        with pytest.raises(InvalidRequestError) as caught:
            asked.result()
        return turns, caught.value

    turns, error = asyncio.run(work())
    assert turns > 5
    assert error.param == "messages"
    assert "chat_template_seconds" in error.message
    deadline = time.monotonic() + 10
    while any(thread.name == "chat-template" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the template still runs"
        time.sleep(0.01)


def test_whoever_gives_up_ends_the_work() -> None:
    async def work() -> None:
        asked = asyncio.ensure_future(template(SPIN).render([USER], Rendering(), "messages"))
        while not any(thread.name == "chat-template" for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(work())
    deadline = time.monotonic() + 10
    while any(thread.name == "chat-template" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the template still runs"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no system') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ 'a' + 5 }}",
        "{% for %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_whatever_a_template_fails_on_is_the_requests_fault_by_name(text: str) -> None:
    assert refusal(text).param == "messages"


def test_the_last_turn_is_continued_where_it_ends() -> None:
    closed = SAID + "{{ '<end>' }}"
    assert render(closed, USER, ASSISTANT) == "[user] hi[assistant] so <end>"
    assert render(closed, USER, ASSISTANT, continued=True, opened=False) == "[user] hi[assistant] so "
    for last in (USER, {**ASSISTANT, "content": " "}, {**ASSISTANT, "tool_calls": [{}]}):
        text = closed + "{{ message.tool_calls }}"
        assert refusal(text, USER, last, continued=True, opened=False).param == "continue_final_message"


def test_only_variables_that_the_template_reads_can_be_set() -> None:
    text = SAID + "{{ mood | default('calm') }}{{ add_generation_prompt }}"
    assert render(text, variables={"mood": "wild"}).endswith("wildTrue")
    for name in ("tone", "messages", "add_generation_prompt", "tools", "chat_template", "tokenize"):
        error = refusal(text, variables={name: "x"})
        assert error.param == f"chat_template_kwargs.{name}"
        assert "mood" in error.message


def test_a_template_of_its_own_for_tools_is_taken_with_tools() -> None:
    both = {"default": "plain", "tool_use": "{{ tools | length }} tools"}
    assert render(both) == "plain"
    assert render(both, tools=[{"type": "function"}]) == "1 tools"
    assert refusal("plain", tools=[{"type": "function"}]).param == "tools"


def test_a_model_without_a_template_says_so() -> None:
    assert "no chat template" in refusal(None).message
