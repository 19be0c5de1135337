"""What a classification task is, and how its items become disjoint train, validation and test examples."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from experts.embedded.skills.skill import Split, split_key, split_of
from experts.errors import CheckpointError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Item:
    """One fact of the source: a text, its label, and the `key` whose hash decides the split.

    Items made of one source object share a key, so that they never stand on two sides of the split.
    """

    text: str
    label: str
    key: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with the index of its label in the task's label set."""

    text: str
    label: int


@dataclass(frozen=True)
class ClassificationTask:
    """A label set, and where its texts come from.

    Attributes:
        labels: the label set, in the order of the head's rows.
        items: reads the source, given a folder for downloads, in a fixed order.
        train_limit: at most so many training examples.
        steps, batch: of training; less where texts are long.
    """

    name: str
    description: str
    source: str
    licence: str
    labels: tuple[str, ...]
    items: Callable[[Path], Iterable[Item]]
    train_limit: int = 4000
    steps: int = 160
    batch: int = 32

    def load(self, split: Split, downloads: Path) -> list[Labelled]:
        """All examples of a split, shuffled by hash, so that a prefix is a fair sample.

        A text that comes with two labels has no right answer and is left out. One that comes with keys of two
        splits belongs to the earlier split alone.

        Raises:
            CheckpointError: the source is not installed, or has a label that the task lacks.
        """
        index = {label: number for number, label in enumerate(self.labels)}
        labels: dict[str, set[str]] = {}
        splits: dict[str, set[Split]] = {}
        chosen: dict[str, Item] = {}
        for item in self.items(downloads):
            if item.label not in index:
                raise CheckpointError(
                    f"task {self.name}: the source has a label {item.label!r}, which is none of "
                    f"{', '.join(self.labels)}; install the version that is named in {self.source!r}"
                )
            text = split_key(item.text)
            labels.setdefault(text, set()).add(item.label)
            splits.setdefault(text, set()).add(split_of(item.key))
            chosen.setdefault(text, item)
        kept = [
            item
            for text, item in chosen.items()
            if len(labels[text]) == 1 and next(side for side in SPLITS if side in splits[text]) == split
        ]
        kept.sort(key=lambda item: digest_number(f"{self.name}|{item.text}"))
        examples = [Labelled(item.text, index[item.label]) for item in kept]
        return examples[: self.train_limit] if split == "train" else examples


def digest_number(text: str) -> int:
    """A hash that is the same in every process (unlike `hash`)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
