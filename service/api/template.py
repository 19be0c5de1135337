"""Messages → the text of a prompt, by the chat template of the bundle's shared folder.

The template comes from that folder alone, never from a request or an expert, and runs in transformers' sandboxed
Jinja environment, away from the event loop and for a bounded time.
"""

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from service.errors import InvalidRequestError

_AT_ONCE = 4
"""Templates that run together; more would only take each other's time."""

_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables that no request may set by name: other fields do."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a chat becomes text.

    Attributes:
        tools: definitions that the template shows to the model.
        opened: it ends where the assistant's turn begins.
        continued: it ends within the last turn, which the answer continues.
        variables: further ones that the template reads.
        special: the tokenizer's own tokens are put around it.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    opened: bool = True
    continued: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    special: bool = False


class _StopRendering(SystemExit):
    """Ends a thread without a word."""


class ChatTemplate:
    """A model's template, and what it can do.

    Args:
        tokenizer: a transformers tokenizer.
        seconds: that one rendering may take.
    """

    def __init__(self, tokenizer: Any, seconds: float) -> None:
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._variables: dict[str, frozenset[str]] = {}

    def text(self, *, tools: bool = False) -> str:
        """Its Jinja text; some models have one more, for tools. Empty where there is none."""
        template = self._tokenizer.chat_template
        if isinstance(template, Mapping):
            name = "tool_use" if tools and "tool_use" in template else "default"
            template = template.get(name)
        return str(template or "")

    def shows_tools(self) -> bool:
        """Whether it tells the model of tools."""
        return "tools" in self._read(self.text(tools=True))

    def check(self, messages: Sequence[Mapping[str, Any]], how: Rendering, param: str) -> None:
        """Refuse what the template would leave out in silence.

        Raises:
            InvalidRequestError: it shows no tools or calls, or reads no variable of a name; or there is none.
        """
        text = self.text(tools=bool(how.tools))
        if not text:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions with a raw prompt.", param=param
            )
        if how.tools and "tools" not in self._read(text):
            raise InvalidRequestError(
                "The chat template of this model shows it no tools, so it cannot call any; remove 'tools', or "
                "describe them in a message.",
                param="tools",
            )
        if "tool_calls" not in text and any(turn.get("tool_calls") for turn in messages):
            raise InvalidRequestError(
                "The chat template of this model leaves calls of tools out; write them as content.",
                param=f"{param}[{next(i for i, turn in enumerate(messages) if turn.get('tool_calls'))}].tool_calls",
            )
        settable = self._read(text) - _OURS - self._tokenizer.special_tokens_map.keys()
        for name in how.variables:
            if name not in settable:
                known = ", ".join(sorted(settable)) or "none"
                raise InvalidRequestError(
                    f"chat_template_kwargs: the chat template of this model reads no {name!r} of a request; what "
                    f"can be set: {known}.",
                    param=f"chat_template_kwargs.{name}",
                )
        if how.continued:
            last = messages[-1]
            if last["role"] != "assistant" or last.get("tool_calls") or not str(last["content"]).strip():
                raise InvalidRequestError(
                    "continue_final_message: the last message must be the assistant's, with text to continue.",
                    param="continue_final_message",
                )

    async def render(self, messages: Sequence[Mapping[str, Any]], how: Rendering, param: str) -> str:
        """The chat's text.

        Raises:
            InvalidRequestError: as `check`; the template refuses the messages, fails on them, or takes too long.
        """
        self.check(messages, how, param)

        def work() -> str:
            # It says that it returns a string, and returns texts and spans.
            found: Any = render_jinja_template(
                [[dict(turn) for turn in messages]],
                tools=[dict(tool) for tool in how.tools] or None,
                chat_template=self.text(tools=bool(how.tools)),
                add_generation_prompt=how.opened,
                continue_final_message=how.continued,
                **{**self._tokenizer.special_tokens_map, **how.variables},
            )
            return str(found[0][0])

        try:
            return await self._in_time(work)
        except InvalidRequestError:
            raise
        except TimeoutError as error:
            raise InvalidRequestError(
                f"{param}: the model's chat template took longer than {self._seconds:g} s with these messages "
                "(chat_template_seconds); send fewer or shorter ones.",
                param=param,
            ) from error
        except Exception as error:
            # A template may fail in as many ways as Python; it did so on what this request sent.
            told = (
                str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            )
            raise InvalidRequestError(
                f"{param}: the model's chat template refuses these messages: {told[:500]}.", param=param
            ) from error

    def _read(self, text: str) -> frozenset[str]:
        if text not in self._variables:
            # The environment that it will run in: others do not know all of its tags.
            try:
                environment = _compile_jinja_template(text).environment
                self._variables[text] = frozenset(meta.find_undeclared_variables(environment.parse(text)))
            except jinja2.TemplateError:
                return frozenset()  # rendering says why
        return self._variables[text]

    async def _in_time(self, work: Callable[[], str]) -> str:
        """The result of `work`, in a thread of its own that is ended when the time is up or nobody waits.

        Raises:
            TimeoutError: it took too long.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Future[str] = loop.create_future()

        def settle(text: str | None, error: Exception | None) -> None:
            if told.done():
                return
            if error is not None:
                told.set_exception(error)
            else:
                told.set_result(text or "")

        def run() -> None:
            text, failure = None, None
            # Stopped, or the loop has closed: nobody waits any more.
            with contextlib.suppress(_StopRendering, RuntimeError):
                try:
                    text = work()
                except Exception as error:  # noqa: BLE001 told to whoever asked
                    failure = error
                loop.call_soon_threadsafe(settle, text, failure)

        async with self._slots:
            thread = threading.Thread(target=run, name="chat-template", daemon=True)
            thread.start()
            try:
                async with asyncio.timeout(self._seconds):
                    return await told
            finally:
                if not told.done() or told.cancelled():
                    _end(thread)


def _end(thread: threading.Thread) -> None:
    """Have a thread that runs Python code end soon; what it does is of no use any more."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_StopRendering)
        )
