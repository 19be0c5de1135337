"""Text → token ids: raw prompts as they are, chats through the shared folder's template.

The template comes from the bundle's shared folder alone, never from a request or an expert, and runs in
transformers' sandboxed Jinja environment.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from service.api.wire.chat import Message
from service.api.wire.completions import PromptItem
from service.errors import ContextLengthError, InvalidRequestError, LimitExceededError

_INLINE_CHARACTERS = 8192
"""Longer texts are tokenised off the event loop; a hop costs more than shorter ones take."""


class PromptEncoder:
    """Makes token ids of prompts and chats and checks them against the limits.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: ids are below it.
        max_context: tokens that fit the model.
        max_prompt_tokens: the configured limit of one prompt; None is `max_context - 1`.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, max_context: int, max_prompt_tokens: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._max_prompt_tokens = max_prompt_tokens
        # One thread: a fast tokenizer refuses to be reconfigured by two threads at once.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    async def prompts(self, items: Sequence[PromptItem]) -> list[tuple[int, ...]]:
        """Token ids of each prompt.

        Raises:
            InvalidRequestError: an id outside the vocabulary, or a prompt without tokens.
            LimitExceededError: a prompt is too long.
        """
        encoded = []
        for index, item in enumerate(items):
            param = "prompt" if len(items) == 1 else f"prompt[{index}]"
            if isinstance(item, str):
                ids = await self._encode(item, special=True)
            else:
                ids = item
                for token in ids:
                    if not 0 <= token < self._vocab_size:
                        raise InvalidRequestError(
                            f"{param}: token id {token} is not in the vocabulary of {self._vocab_size}.",
                            param=param,
                        )
            encoded.append(self._checked(ids, param))
        return encoded

    async def chat(self, messages: Sequence[Message], param: str = "messages") -> tuple[int, ...]:
        """Token ids of a chat, up to where the assistant's turn begins.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses the messages.
            LimitExceededError: the chat is too long.
        """
        turns = [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.content}
            for turn in messages
        ]
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions with a raw prompt.", param=param
            )
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidRequestError(
                f"{param}: the model's chat template refuses these messages: {error}.", param=param
            ) from error
        # The template writes the special tokens itself.
        return self._checked(await self._encode(text, special=False), param)

    async def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode_now(text, special)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode_now, text, special)

    def _encode_now(self, text: str, special: bool) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special))
        except (UnicodeEncodeError, TypeError) as error:  # a lone surrogate is JSON but not text
            raise InvalidRequestError(f"The text cannot be encoded: {error}.") from error

    def _checked(self, ids: tuple[int, ...], param: str) -> tuple[int, ...]:
        if not ids:
            raise InvalidRequestError(
                f"{param}: no token is left of this prompt; send some text.", param=param
            )
        if self._max_prompt_tokens is not None and len(ids) > self._max_prompt_tokens:
            raise LimitExceededError(
                f"{param} has {len(ids)} tokens; the limit is {self._max_prompt_tokens} (max_prompt_tokens).",
                param=param,
            )
        if len(ids) >= self._max_context:
            raise ContextLengthError(
                f"{param} has {len(ids)} tokens; the model's context is {self._max_context} "
                "and at least one is for the answer.",
                param=param,
            )
        return ids
