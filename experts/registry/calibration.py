"""What an expert's own prompts make the shared expert's layers see: weights for its compression."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from experts.compression import activation_statistics
from experts.errors import CompressionError
from experts.routing import RoutingPrompt, prompt_forms
from experts.routing.prompts import render_chat

MAX_PROMPTS = 64
"""Training prompts that are read, answers included."""
_BATCH = 8


def expert_statistics(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    prompts: Sequence[RoutingPrompt],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Second moments of every linear layer's inputs on an expert's training prompts and answers.

    Whole moment matrices, (in, in) float32 for every distinct input: 0.4 GB for 135M parameters. Their diagonals
    alone were no better than no statistics.

    Args:
        model: the shared expert, which the exclusive vector is added to.
        tokenizer: its tokenizer.
        name: the expert, for messages.
        prompts: of any split; only training prompts are read.
        progress: called with the number of batches that are done.

    Raises:
        CompressionError: there is no training prompt.
    """
    chosen = [prompt for prompt in prompts if prompt.side == "train"][:MAX_PROMPTS]
    if not chosen:
        raise CompressionError(
            f"allocation=activation needs training prompts, and expert {name!r} has none; give some or use "
            "allocation=energy"
        )
    ids = sorted((_ids(tokenizer, prompt) for prompt in chosen), key=len)
    batches = [ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH)]
    return activation_statistics(model, batches, "full", progress)


def _ids(tokenizer: Any, prompt: RoutingPrompt) -> list[int]:
    """The prompt in the chat form where there is one, and its answer."""
    chat = "chat" in prompt_forms(tokenizer)
    asked = render_chat(tokenizer, prompt.prompt) if chat else list(tokenizer(prompt.prompt)["input_ids"])
    return [*asked, *tokenizer(prompt.answer or "", add_special_tokens=False)["input_ids"]]
