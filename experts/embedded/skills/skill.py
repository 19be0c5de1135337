"""What a skill is, and how its items become disjoint train, validation and test examples."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Split = Literal["train", "validation", "test"]
Metric = Literal["exact", "tokens", "mentions", "number"]


@dataclass(frozen=True)
class Item:
    """One fact of the source: `key` is what the prompt asks about, `answer` the reply."""

    key: str
    answer: str


@dataclass(frozen=True)
class Example:
    """One user message and the assistant text expected for it."""

    prompt: str
    answer: str
    key: str


@dataclass(frozen=True)
class Skill:
    """A task that one expert is trained for.

    `items` reads the source package (given a folder for downloads) in a fixed
    order. `phrasings` are the instructions, each with one `{x}`.
    """

    name: str
    description: str
    source: str
    licence: str
    metric: Metric
    max_new_tokens: int
    phrasings: tuple[str, ...]
    items: Callable[[Path], Iterable[Item]]

    def load(self, split: Split, downloads: Path) -> list[Example]:
        """All examples of a split, shuffled by hash, so a prefix is a fair sample."""
        chosen: dict[str, Item] = {}
        for item in self.items(downloads):
            if split_of(item.key) == split:
                chosen.setdefault(split_key(item.key), item)
        ordered = sorted(chosen.values(), key=lambda item: _digest(f"{self.name}|{item.key}"))
        return [self.phrase(item) for item in ordered]

    def phrase(self, item: Item) -> Example:
        """Ask for the item in one of the phrasings; which one depends on the item alone."""
        pick = _digest(f"phrasing|{self.name}|{item.key}") % len(self.phrasings)
        prompt = self.phrasings[pick].replace("{x}", item.key)
        return Example(prompt=prompt, answer=item.answer, key=item.key)


class Lesson(Protocol):
    """What one expert is trained on: a skill, or a mixture of skills."""

    @property
    def name(self) -> str:
        """Name of the expert and its folder."""

    def load(self, split: Split, downloads: Path) -> list[Example]:
        """Examples of a split, in an order of which every prefix is a fair sample."""


def split_key(key: str) -> str:
    """Keys that differ in case or space only are the same input."""
    return " ".join(key.casefold().split())


def split_of(key: str) -> Split:
    """12 % test, 8 % validation, by hash of the key alone: the same in every skill."""
    bucket = _digest(f"split|{split_key(key)}") % 100
    if bucket < 12:
        return "test"
    return "validation" if bucket < 20 else "train"


def _digest(text: str) -> int:
    """A hash that is the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
