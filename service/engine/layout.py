"""How the tokens of one step lie in the packed batch: plain integers made by the engine, read by attention.

Packing order: one token for each decoding sequence, then the prompt chunks, then whole prompts to route.
The first two kinds live in the KV cache; routed prompts are read once and leave nothing behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Tables = Sequence[Sequence[int]]
"""Block ids of one sequence, for every KV group; index = position // BLOCK_TOKENS."""


@dataclass(frozen=True, slots=True)
class Decode:
    """One token of a decoding sequence, at `position`."""

    position: int
    tables: Tables


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [begin, end) of the pack are positions [start, start + end - begin) of one sequence."""

    begin: int
    end: int
    start: int
    tables: Tables


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [begin, end) of the pack are one whole prompt that attends to itself only."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PackLayout:
    """One step.

    Attributes:
        decode: token i of the pack belongs to decode[i].
        chunks: prompt chunks, in packing order after the decoding tokens.
        segments: prompts to route, in packing order after the chunks.
    """

    decode: tuple[Decode, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def cached_tokens(self) -> int:
        """How many leading tokens of the pack are written to the KV cache."""
        return self.chunks[-1].end if self.chunks else len(self.decode)
