"""Routing prompts: the JSON-lines file that says what an expert is for, and its prompts as token ids."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.errors import RoutingError

Split = Literal["train", "validation"]
Form = Literal["chat", "raw"]


class RoutingPrompt(BaseModel):
    """One line of a prompts file.

    Attributes:
        prompt: what a user would send.
        answer: what the expert should say; only tuning needs it.
        split: train or validation; without it one prompt in five, chosen by its hash, is validation.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: str = Field(min_length=1)
    answer: str | None = None
    split: Split | None = None

    @property
    def side(self) -> Split:
        """The split it belongs to."""
        if self.split is not None:
            return self.split
        return "validation" if hashlib.sha256(self.prompt.encode()).digest()[0] % 5 == 0 else "train"


def load_prompts(path: Path) -> tuple[RoutingPrompt, ...]:
    """Every line of a prompts file.

    Raises:
        RoutingError: the file is missing, or a line is not a prompt; names the file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RoutingError(f"{path}: cannot read prompts ({error})") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(RoutingPrompt.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "line"
            raise RoutingError(
                f"{path}:{number}: {where}: {problem['msg']}; "
                'each line is {"prompt": …, "answer": …, "split": …}'
            ) from error
    if not prompts:
        raise RoutingError(f"{path}: no prompts; give one JSON object a line")
    return tuple(prompts)


def prompt_forms(tokenizer: Any) -> tuple[Form, ...]:
    """The forms in which a prompt can reach the server: chat needs a template, raw never does."""
    return ("chat", "raw") if getattr(tokenizer, "chat_template", None) else ("raw",)


def render_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of every prompt in each of `prompt_forms`, prompt by prompt: [chat 0, raw 0, chat 1, …].

    A router learns both forms, so that completions and chats of the same task go to the same expert.

    Raises:
        RoutingError: a prompt has no tokens, or the chat template refuses it.
    """
    rendered: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        for form in prompt_forms(tokenizer):
            ids = render_chat(tokenizer, prompt) if form == "chat" else list(tokenizer(prompt)["input_ids"])
            if not ids:
                raise RoutingError(f"prompt {index} ({prompt[:40]!r}) has no tokens; give text")
            rendered.append(ids)
    return rendered


def render_chat(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of one user turn through the chat template, ready for the answer."""
    turns = [{"role": "user", "content": prompt}]
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    except Exception as error:
        raise RoutingError(f"the chat template refuses the prompt {prompt[:40]!r}: {error}") from error
    return list(encoded["input_ids"])
