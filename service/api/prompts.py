"""Text → token ids: raw prompts as they are, chats through the shared folder's template."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from service.api.template import ChatTemplate, Rendering
from service.api.wire.chat import Message
from service.api.wire.completions import PromptItem
from service.errors import ContextLengthError, InvalidRequestError, LimitExceededError

_INLINE_CHARACTERS = 8192
"""Longer texts are tokenised off the event loop; a hop costs more than shorter ones take."""

PLAIN = Rendering()


class PromptEncoder:
    """Makes token ids of prompts and chats and checks them against the limits.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: ids are below it.
        max_context: tokens that fit the model.
        max_prompt_tokens: the configured limit of one prompt; None is `max_context - 1`.
        template_seconds: that the chat template may take.

    Attributes:
        template: the model's.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        max_context: int,
        max_prompt_tokens: int | None,
        template_seconds: float = 5.0,
    ) -> None:
        self.template = ChatTemplate(tokenizer, template_seconds)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_context = max_context
        self._max_prompt_tokens = max_prompt_tokens
        # One thread: a fast tokenizer refuses to be reconfigured by two threads at once.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    async def prompts(
        self,
        items: Sequence[PromptItem],
        name: str = "prompt",
        *,
        special: bool = True,
        keep: int | None = None,
    ) -> list[tuple[int, ...]]:
        """Token ids of each prompt.

        Args:
            items: texts or ids.
            name: the field that they came in.
            special: with what the tokenizer puts around a text.
            keep: that many tokens of each one's end; None keeps all.

        Raises:
            InvalidRequestError: an id outside the vocabulary, or a prompt without tokens.
            LimitExceededError: a prompt is too long.
        """
        encoded = []
        for index, item in enumerate(items):
            param = name if len(items) == 1 else f"{name}[{index}]"
            if isinstance(item, str):
                ids = await self._encode(item, special)
            else:
                ids = item
                self._check_vocabulary(ids, param)
            encoded.append(self._checked(_end_of(ids, keep), param))
        return encoded

    async def chat(
        self,
        messages: Sequence[Message],
        param: str = "messages",
        how: Rendering = PLAIN,
        keep: int | None = None,
    ) -> tuple[int, ...]:
        """Token ids of a chat, up to where the assistant's turn begins unless `how` says otherwise.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses the messages.
            LimitExceededError: the chat is too long.
        """
        return self._checked(_end_of(await self.chat_tokens(messages, param, how), keep), param)

    async def chat_tokens(
        self, messages: Sequence[Message], param: str = "messages", how: Rendering = PLAIN
    ) -> tuple[int, ...]:
        """Token ids of a chat of any length.

        Args:
            messages: its turns.
            param: the field that they came in.
            how: where it ends, and what the template is told besides.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses the messages.
        """
        text = await self.template.render([turn.described() for turn in messages], how, param)
        # Most templates write the special tokens themselves.
        return await self._encode(text, how.special)

    def sequences(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of words as they stand at a text's beginning, and behind a space."""
        spelled = [f"{space}{word.lstrip()}" for word in words for space in ("", " ")]
        found = (self._encode_now(text, special=False) for text in spelled)
        return tuple(dict.fromkeys(ids for ids in found if ids))

    async def tokens(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Token ids of a text of any length, perhaps none.

        Args:
            text: what to encode.
            special: with what the tokenizer puts around a text.

        Raises:
            InvalidRequestError: the text cannot be encoded.
        """
        return await self._encode(text, special)

    async def text(self, ids: Sequence[int], param: str) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequestError: an id outside the vocabulary.
        """
        self._check_vocabulary(ids, param)
        decode = partial(self._tokenizer.decode, list(ids), skip_special_tokens=False)
        if len(ids) <= _INLINE_CHARACTERS:
            return str(decode())
        return str(await asyncio.get_running_loop().run_in_executor(self._thread, decode))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it; empty for an id that the tokenizer does not use."""
        found = self._tokenizer.convert_ids_to_tokens(list(ids))
        return [piece or "" for piece in found]

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

    def _check_vocabulary(self, ids: Sequence[int], param: str) -> None:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise InvalidRequestError(
                    f"{param}: token id {token} is not in the vocabulary of {self._vocab_size}.", param=param
                )

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


def _end_of(ids: tuple[int, ...], keep: int | None) -> tuple[int, ...]:
    return ids if keep is None else ids[-keep:]
