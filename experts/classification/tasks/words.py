"""Tasks over words: how two words relate, and which form a word is in."""

from collections.abc import Iterator
from pathlib import Path

from experts.classification.task import ClassificationTask, Item, digest_number
from experts.classification.tasks.wordnet import LICENCE, SOURCE, Synset, synsets
from experts.embedded.skills.inflect import rows

RELATIONS = ("antonym", "synonym", "general", "part")
FORMS = ("plural", "third person", "participle", "past", "comparative", "superlative")
_SHARE = {"antonym": 1, "synonym": 8, "general": 14, "part": 1}
"""One pair in so many is used, so that the classes are of like size."""


def relation() -> ClassificationTask:
    """Two words → how the second relates to the first."""
    return ClassificationTask(
        name="relation",
        description='how two words relate, from "one / other"',
        source=SOURCE,
        licence=LICENCE,
        labels=RELATIONS,
        items=_pairs,
    )


def form() -> ClassificationTask:
    """An inflected English word → its form."""
    return ClassificationTask(
        name="form",
        description="grammatical form of an inflected English word",
        source="lemminflect 0.2.3 (NIH SPECIALIST Lexicon)",
        licence="MIT; SPECIALIST Lexicon terms (free use with attribution)",
        labels=FORMS,
        items=_forms,
    )


def _pairs(downloads: Path) -> Iterator[Item]:
    for part in ("noun", "verb", "adj"):
        known = {synset.offset: synset for synset in synsets(downloads, part)}
        for synset in known.values():
            for label, one, other in _related(synset, known):
                # Both orders share a key, so that an antonym never stands on two sides of the split.
                key = " / ".join(sorted((one, other)))
                if one != other and _plain(one) and _plain(other) and digest_number(key) % _SHARE[label] == 0:
                    yield Item(f"{one} / {other}", label, key)


def _related(synset: Synset, known: dict[str, Synset]) -> Iterator[tuple[str, str, str]]:
    """(relation, word, word) of one synset."""
    for first, second in zip(synset.words, synset.words[1:], strict=False):
        yield "synonym", first, second
    for symbol, offset, _, source, target in synset.pointers:
        other = known.get(offset)
        if other is None:
            continue
        if symbol == "!":
            yield "antonym", synset.words[source - 1], other.words[target - 1]
        elif symbol == "@":
            yield "general", synset.words[0], other.words[0]
        elif symbol in ("#p", "#s"):
            yield "part", synset.words[0], other.words[0]


def _plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower()


def _forms(downloads: Path) -> Iterator[Item]:
    # Rows are lemma, then the forms in this order; "a/b" variants and gaps fail `_plain`.
    columns = {
        "noun": {1: "plural"},
        "verb": {1: "past", 3: "participle", 4: "third person"},
        "adj": {1: "comparative", 2: "superlative"},
    }
    for part, wanted in columns.items():
        for row in rows(part):
            for column, label in wanted.items():
                if (
                    column < len(row)
                    and _plain(row[column])
                    and row[column] != row[0]
                    and _kept(row[0], part)
                ):
                    yield Item(row[column], label, row[0])


def _kept(lemma: str, part: str) -> bool:
    """One noun in eight and one verb in two; adjectives that are compared are few."""
    return digest_number(lemma) % {"noun": 8, "verb": 2, "adj": 1}[part] == 0
