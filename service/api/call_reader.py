"""A model's answer → text and calls of functions, as it comes; a whole answer is read the same way."""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from service.api.call_scan import CallScan


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of the call of that index: the first has its id and the function's name."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Read = str | CallPiece
"""Text of the answer, or a piece of a call."""


class CallReader:
    """Splits one answer. What looks like a call and is none stays text; space around calls is dropped.

    Args:
        names: of the functions that exist.
        opens: what a call begins behind; empty for answers that are bare JSON objects, or else text alone.
        closes: what ends it; of bare objects, what may stand between two.
        parallel: further calls than the first are told, too.
    """

    def __init__(self, names: Collection[str], opens: str, closes: str, *, parallel: bool) -> None:
        self._names = names
        self._opens = opens
        self._closes = closes
        self._parallel = parallel
        self._place: Literal["text", "call", "after"] = "text"
        self._held = ""
        self._scan = CallScan(names)
        self._seen = ""
        self._only_text = False
        self._announced = False
        self.calls = 0

    def push(self, text: str) -> list[Read]:
        """Read on; what is now certain."""
        self._held += text
        read: list[Read] = []
        moved = True
        while moved:
            place = self._place
            step = {"text": self._text, "call": self._call, "after": self._after}[place]
            read += step()
            moved = self._place != place
        return read

    def finish(self) -> list[Read]:
        """The answer has ended: what was held back."""
        if self._place == "call":
            dropped = self._announced or self._silent
            return [] if dropped else self._as_text(self._seen + self._held)
        if self._place == "after":
            return []
        rest, self._held = self._held, ""
        return [rest] if rest and (self.calls == 0 or not rest.isspace()) else []

    @property
    def _silent(self) -> bool:
        """What is being read is one call too many."""
        return not self._parallel and self.calls > 0 and not self._announced

    def _text(self) -> list[Read]:
        if self._only_text:
            return self._release(len(self._held))
        if not self._opens:
            return self._bare()
        at = self._held.find(self._opens)
        if at >= 0:
            before = self._held[:at].rstrip()
            self._begin(self._opens, self._held[at + len(self._opens) :])
            return [before] if before else []
        return self._release(len(self._held.removesuffix(_start_of(self._opens, self._held)).rstrip()))

    def _bare(self) -> list[Read]:
        """An answer that begins with an object is calls; any other is text to its end."""
        found = self._held.lstrip()
        if not found:
            return []
        if found.startswith("{"):
            self._begin(self._held[: len(self._held) - len(found)], found)
            return []
        self._only_text = True
        return self._release(len(self._held))

    def _begin(self, seen: str, rest: str) -> None:
        self._place, self._scan, self._announced = "call", CallScan(self._names), False
        self._seen, self._held = seen, rest

    def _call(self) -> list[Read]:
        used = 0
        for character in self._held:
            if self._scan.over or not self._scan.put(character):
                break
            used += 1
        self._seen, self._held = self._seen + self._held[:used], self._held[used:]
        read = self._tell()
        if self._scan.place == "broken":
            return read + ([] if self._announced else self._as_text(self._seen)) + self._leave()
        if self._scan.place == "done":
            self._place = "after"
        return read

    def _tell(self) -> list[Read]:
        if self._scan.name is None or self._silent:
            return []
        arguments = self._scan.take()
        if self._announced:
            return [CallPiece(self.calls - 1, arguments)] if arguments else []
        self._announced = True
        self.calls += 1
        return [CallPiece(self.calls - 1, arguments, f"call_{uuid.uuid4().hex[:24]}", self._scan.name)]

    def _after(self) -> list[Read]:
        rest = self._held.lstrip()
        if not rest or (self._closes != rest and self._closes.startswith(rest)):
            return []
        self._held = rest.removeprefix(self._closes)
        return self._leave()

    def _leave(self) -> list[Read]:
        self._place = "text"
        return []

    def _as_text(self, text: str) -> list[Read]:
        if not self._opens:
            self._only_text = True
        return [text] if text else []

    def _release(self, count: int) -> list[Read]:
        text, self._held = self._held[:count], self._held[count:]
        return [text] if text else []


def read_whole(reader: CallReader, text: str) -> tuple[str, list[CallPiece]]:
    """A whole answer: its text, and its calls with all of their arguments."""
    content: list[str] = []
    calls: list[CallPiece] = []
    for read in (*reader.push(text), *reader.finish()):
        if isinstance(read, str):
            content.append(read)
        elif read.name is not None:
            calls.append(read)
        else:
            last = calls[-1]
            calls[-1] = CallPiece(last.index, last.arguments + read.arguments, last.id, last.name)
    return "".join(content), calls


def pieces_joined(read: Sequence[Read]) -> tuple[str, list[CallPiece]]:
    """What came at once: its text, and one piece for each call that it belongs to."""
    content: list[str] = []
    calls: list[CallPiece] = []
    for one in read:
        if isinstance(one, str):
            content.append(one)
        elif calls and calls[-1].index == one.index:
            last = calls[-1]
            calls[-1] = CallPiece(last.index, last.arguments + one.arguments, last.id, last.name)
        else:
            calls.append(one)
    return "".join(content), calls


def _start_of(marker: str, text: str) -> str:
    """The longest end of the text that begins the marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return marker[:length]
    return ""
