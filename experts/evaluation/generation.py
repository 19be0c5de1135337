"""Greedy generation on a plain `transformers` model, batched and sorted by length.

The reference way to get answers: no hooks, no scheduler. A server's engine is
compared by passing its own `Generate` where this one's is taken.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# (chat texts, max_new_tokens) → one answer a text, without special tokens.
Generate = Callable[[Sequence[str], int], list[str]]


def plain_generator(model: Any, tokenizer: Any, batch: int = 64) -> Generate:
    """A `Generate` for a model whose weights are what is to be measured."""

    def generate(texts: Sequence[str], max_new_tokens: int) -> list[str]:
        encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        answers = [""] * len(encoded)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            for i, answer in zip(rows, _batch(model, tokenizer, encoded, rows, max_new_tokens), strict=True):
                answers[i] = answer
        return answers

    return generate


def _batch(
    model: Any, tokenizer: Any, encoded: Sequence[list[int]], rows: Sequence[int], limit: int
) -> list[str]:
    """Left-pad the rows, generate greedily, cut the prompts off."""
    width = max(len(encoded[i]) for i in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, i in enumerate(rows):
        ids[place, width - len(encoded[i]) :] = torch.tensor(encoded[i])
        mask[place, width - len(encoded[i]) :] = 1
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return [str(text) for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]
