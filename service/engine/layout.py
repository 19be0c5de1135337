"""How the tokens of one step lie in the packed batch: plain integers made by the engine, read by attention.

Packing order: one token for each decoding sequence, then the prompt chunks, then whole prompts to route.
The first two kinds live in the KV cache; routed prompts are read once and leave nothing behind.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [begin, end) of the pack are positions [start, start + end - begin) of KV row `row`."""

    begin: int
    end: int
    row: int
    start: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [begin, end) of the pack are one whole prompt that attends to itself only."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PackLayout:
    """One step.

    Attributes:
        decode_rows: KV row of each decoding token, ascending.
        decode_positions: its position in the sequence.
        chunks: prompt chunks, in packing order after the decoding tokens.
        segments: prompts to route, in packing order after the chunks.
    """

    decode_rows: tuple[int, ...] = ()
    decode_positions: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def cached_tokens(self) -> int:
        """How many leading tokens of the pack are written to the KV cache."""
        return self.chunks[-1].end if self.chunks else len(self.decode_rows)
