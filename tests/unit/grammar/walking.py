"""Grammars without a model: every allowed token is as good as any other."""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from service.core import Constraint
from service.grammar import Grammar, GrammarOptions, Grammars, Run
from tests.fixtures.tiny import VOCABULARY, tiny_tokenizer

END = 2
"""`<|im_end|>` of the tiny tokenizer."""


def tokenizer_in(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(path))


def grammars(
    tokenizer: PreTrainedTokenizerBase, size: int = VOCABULARY, ends: Sequence[int] = (END,), **options: Any
) -> Grammars:
    return Grammars(tokenizer, size, ends, GrammarOptions(**options))


def compiled(made: Grammars, kind: Any, text: Any = "", param: str = "field") -> Grammar:
    """`text` that is no string becomes JSON."""
    definition = text if isinstance(text, str) else json.dumps(text)
    return asyncio.run(made.get(Constraint(kind, definition, param)))


def allowed_ids(run: Run) -> list[int]:
    return np.flatnonzero(run.allowed()).tolist()


def spell(run: Run, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Go that way, which the grammar must allow."""
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert token in allowed_ids(run), (text, tokenizer.decode([token]))
        run.advance(token)


def accepts(grammar: Grammar, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """The whole text, and nothing has to follow."""
    run = Run(grammar, "field")
    for token in tokenizer.encode(text, add_special_tokens=False):
        if run.complete or token not in allowed_ids(run):
            return False
        run.advance(token)
    return run.complete or END in allowed_ids(run)


def wander(grammar: Grammar, tokenizer: PreTrainedTokenizerBase, seed: int, limit: int = 4000) -> str:
    """A random text of the grammar, ended as soon as it may."""
    draw, run = random.Random(seed), Run(grammar, "field")
    tokens: list[int] = []
    while not run.complete:
        assert len(tokens) < limit, "the grammar does not come to an end"
        ids = allowed_ids(run)
        token = END if END in ids else draw.choice(ids)
        run.advance(token)
        if token == END:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)
