"""Token ids → text, as they come: whole characters only, stop strings cut out."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT = 8
"""Prompt tokens that the decoder sees first, so that a leading space of the answer is kept."""


class TextStream:
    """Incremental text of one request.

    Text that might be the beginning of a stop string is held back until it is clear. Bytes that never
    become a whole character are never emitted.

    Args:
        backend: the fast tokenizer's own object.
        stops: strings that end the text.
    """

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._backend = backend
        self._stops = tuple(stops)
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._stream = DecodeStream(ids=list(self._ids), skip_special_tokens=True)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add one token; returns the text that is now certain. Sets `stopped_by` when a stop string ends it.

        Args:
            may_stop: False while the request has not reached its minimum length.
        """
        self._held += self._decode(token)
        if not self._stops or not may_stop:
            return self._release(len(self._held))
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = self._held[:at]
            return self._release(at)
        return self._release(len(self._held) - self._open_length())

    def finish(self) -> str:
        """Text still held back when generation ended for another reason."""
        return self._release(len(self._held))

    def _decode(self, token: int) -> str:
        self._ids.append(token)
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception as error:
            if "prefix" not in str(error).lower():
                raise
            # The library gives up when a token rewrites text before it; start over with it as context.
            self._stream = DecodeStream(ids=list(self._ids), skip_special_tokens=True)
            return ""

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _open_length(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
