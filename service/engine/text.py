"""Token ids → text, as they come: whole characters only, stop strings cut out."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_CONTEXT = 8
"""Prompt tokens that are decoded before the answer's, so that its leading space is kept."""

_LONGEST_CHARACTER = 8
"""Tokens after which text that still ends in a broken character is taken as it is."""

_UNFINISHED = 3
"""Bytes of a character that still lacks one, at most."""

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
        include_stop: the one that does is part of it.
        skip_special: special tokens leave no text.
    """

    def __init__(
        self,
        backend: Tokenizer,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        *,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        self._backend = backend
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._skip_special = skip_special
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
            end = at + len(self.stopped_by) if self._include_stop else at
            self._held = self._held[:end]
            return self._release(end)
        return self._release(len(self._held) - self._open_length())

    def finish(self) -> str:
        """Text still held back when generation ended for another reason; what stayed unfinished ends as a mark."""
        if self._read < len(self._window):
            before, after = self._text(self._read), self._text(len(self._window))
            self._held += _gained(before, after)
            self._read = len(self._window)
        return self._release(len(self._held))

    def _decode(self, token: int) -> str:
        self._window.append(token)
        before, after = self._text(self._read), self._text(len(self._window))
        end = len(self._window)
        if after.endswith(_BROKEN):
            if end - self._read < _LONGEST_CHARACTER:
                return ""
            end, after = self._certain(after)
        # The window keeps what was new last time: enough context, and its cost does not grow.
        if len(self._window) > _CONTEXT:
            self._window, end = self._window[self._read :], end - self._read
        self._read = end
        return _gained(before, after)

    def _text(self, end: int) -> str:
        """Of the window up to `end`."""
        return str(self._backend.decode(self._window[:end], skip_special_tokens=self._skip_special))

    def _certain(self, text: str) -> tuple[int, str]:
        """How many of the window's tokens make text that no later one changes, and that text.

        Args:
            text: of the whole window; it ends in bytes that may still become a character.
        """
        for end in range(len(self._window) - _UNFINISHED, self._read, -1):
            begun = self._text(end)
            if text.startswith(begun):
                return end, begun
        return len(self._window), text

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


def _gained(before: str, after: str) -> str:
    """What tokens added; a prompt may end within a character, whose mark they then replace."""
    shared = 0
    while shared < min(len(before), len(after)) and before[shared] == after[shared]:
        shared += 1
    return after[shared:]
