"""Token ids → text, as they come: whole characters only, stop strings cut out."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_CONTEXT = 8
"""Prompt tokens that are decoded before the answer's, so that its leading space is kept."""

_LONGEST_CHARACTER = 8
"""Tokens after which text that still ends in a broken character is taken as it is."""

_BROKEN = "\ufffd"
"""What a decoder shows for bytes that are no whole character."""


class TextStream:
    """Incremental text of one request.

    Each token is decoded behind a short window of the tokens before it, and what the window gains is the
    token's text; decoders treat a token differently at the beginning of a text. Bytes that do not make a
    whole character wait for more. Text that might be the beginning of a stop string is held back until it
    is clear.

    Args:
        backend: the fast tokenizer's own object.
        stops: strings that end the text.
    """

    def __init__(self, backend: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._backend = backend
        self._stops = tuple(stops)
        self._window = list(prompt_ids[-_CONTEXT:])
        self._read = len(self._window)
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
        self._window.append(token)
        before = self._backend.decode(self._window[: self._read], skip_special_tokens=True)
        after = self._backend.decode(self._window, skip_special_tokens=True)
        if after.endswith(_BROKEN) and len(self._window) - self._read < _LONGEST_CHARACTER:
            return ""
        # The window keeps what was new last time: enough context, and its cost does not grow.
        self._window = self._window[self._read :] if len(self._window) > _CONTEXT else self._window
        self._read = len(self._window)
        # Not after[len(before):]: a prompt may end within a character, whose mark the answer then replaces.
        shared = 0
        while shared < min(len(before), len(after)) and before[shared] == after[shared]:
            shared += 1
        return after[shared:]

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
