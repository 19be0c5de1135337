"""The served tokenizer as the library's: the bytes of every token, and which tokens are text."""

import re
import threading
from collections.abc import Sequence

import numpy as np
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from service.grammar.faults import DefinitionError, shortened

_BY_NUMBER = re.compile(r"<\[[0-9*^]")


class Vocabulary:
    """Token ids of the model, text or not. Made by whoever needs it first, since it takes seconds.

    Args:
        tokenizer: as the bundle's folder has it.
        size: of the model's vocabulary, which can be larger than the tokenizer's or smaller.
        ends: end-of-sequence token ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.size = size
        self.ends = tuple(sorted(ends))
        self._making = threading.Lock()
        self._made: LLTokenizer | None = None
        self._plain: NDArray[np.int32] | None = None

    @property
    def ready(self) -> bool:
        """Made already."""
        return self._made is not None

    @property
    def made(self) -> LLTokenizer:
        """The library's tokenizer; made at the first call, which other threads then wait for.

        Raises:
            DefinitionError: this kind of tokenizer cannot be constrained.
        """
        with self._making:
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self) -> LLTokenizer:
        if not self.ends:
            raise DefinitionError(
                "this model has no end-of-sequence token, so that no answer could end where it must"
            )
        size = max(self.size, len(self._tokenizer), max(self.ends) + 1)
        try:
            return from_tokenizer(
                self._tokenizer,  # type: ignore[arg-type]  # its older name
                n_vocab=size,
                eos_token=list(self.ends),
            )
        except Exception as error:
            raise DefinitionError(
                f"this model's tokenizer cannot be constrained: {shortened(str(error))}"
            ) from error

    @property
    def words(self) -> int:
        """32-bit words of one row's mask."""
        return (self.made.vocab_size + 31) // 32

    def allowed(self, definition: str | None) -> NDArray[np.int32]:
        """Mask of the tokens that can ever come: text, ends, and special tokens that a grammar names.

        Special tokens leave no text, so that an answer would not read as its grammar says; the library lets
        some negations match them.

        Args:
            definition: a grammar's text; None where no token is named.
        """
        made = self.made
        if definition is not None and _BY_NUMBER.search(definition):
            return np.full(self.words, -1, dtype=np.int32)
        bits = np.zeros(self.words * 32, dtype=np.uint8)
        known = len(self._tokenizer)
        for token in range(known):
            bits[token] = not made.is_special_token(token)
        bits[list(self.ends)] = 1
        if definition is not None:
            for token, added in self._tokenizer.added_tokens_decoder.items():
                if str(added.content) in definition:
                    bits[token] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)
