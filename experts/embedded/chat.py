"""How a prompt becomes the base's tokens: its own chat template, default system prompt included."""

from dataclasses import dataclass
from typing import Any

from experts.embedded.skills.skill import Example


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example: `suffix` follows the prefix that all prompts share."""

    suffix: list[int]
    answer: list[int]


def chat_text(tokenizer: Any, prompt: str) -> str:
    """The prompt as one user message, ready for the assistant's reply."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return str(text)


def shared_prefix(tokenizer: Any) -> list[int]:
    """Tokens before the user's text (system prompt and role marks), the same for every prompt."""
    before, _, _ = chat_text(tokenizer, "\0").partition("\0")
    return [int(token) for token in tokenizer(before, add_special_tokens=False).input_ids]


def encode(tokenizer: Any, example: Example, prefix: list[int]) -> Encoded:
    """Tokenise a training example; the answer ends with EOS (`<|im_end|>`)."""
    ids = tokenizer(chat_text(tokenizer, example.prompt), add_special_tokens=False).input_ids
    if ids[: len(prefix)] != prefix:  # tokenised differently at the seam: cannot share the prefix
        raise ValueError(f"the prompt {example.prompt!r} does not begin with the shared prefix")
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    return Encoded(suffix=ids[len(prefix) :], answer=[*answer, tokenizer.eos_token_id])
