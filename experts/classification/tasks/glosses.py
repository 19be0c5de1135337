"""Three tasks over WordNet's definitions and usage examples, whose inputs differ in form alone.

`kind` and `definition` share the glosses: "word: gloss" asks for the class, a bare gloss for the part of speech.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experts.classification.task import ClassificationTask, Item
from experts.classification.tasks.wordnet import LICENCE, SOURCE, synsets
from experts.embedded.skills.category import CLASSES, FIRST_FILE

PARTS = ("noun", "verb", "adj", "adv")
VERB_CLASSES = (
    "body",
    "change",
    "cognition",
    "communication",
    "competition",
    "consumption",
    "contact",
    "creation",
    "emotion",
    "motion",
    "perception",
    "possession",
    "social",
    "stative",
    "weather",
)
_FIRST_VERB_FILE = 29
_SAMPLED = 6
"""One noun synset in so many is used: there are 82,000."""

_wordnet = partial(ClassificationTask, source=SOURCE, licence=LICENCE)


def kind() -> ClassificationTask:
    """A defined noun → its class, one of 25."""
    return _wordnet(
        name="kind",
        description='semantic class of a noun, from "word: definition"',
        labels=CLASSES,
        items=_kinds,
    )


def definition() -> ClassificationTask:
    """A bare definition → part of speech of what it defines."""
    return _wordnet(
        name="definition",
        description="part of speech of the word that a definition defines",
        labels=PARTS,
        items=_definitions,
    )


def scene() -> ClassificationTask:
    """A usage example of a verb → what kind of doing it shows, one of 15."""
    return _wordnet(
        name="scene",
        description="semantic class of the verb that a short sentence shows",
        labels=VERB_CLASSES,
        items=_scenes,
    )


def _kinds(downloads: Path) -> Iterator[Item]:
    for synset in synsets(downloads, "noun"):
        if synset.lexicographer >= FIRST_FILE and synset.gloss and int(synset.offset) % _SAMPLED == 0:
            text = f"{synset.words[0]}: {synset.gloss}"
            yield Item(text, CLASSES[synset.lexicographer - FIRST_FILE], synset.gloss)


def _definitions(downloads: Path) -> Iterator[Item]:
    for part in PARTS:
        for synset in synsets(downloads, part):
            # About 3,500 of each; only adverbs are fewer.
            share = {"noun": 24, "verb": 4, "adj": 5, "adv": 1}[part]
            if synset.gloss and int(synset.offset) % share == 0:
                yield Item(synset.gloss, part, synset.gloss)


def _scenes(downloads: Path) -> Iterator[Item]:
    for synset in synsets(downloads, "verb"):
        for example in synset.examples:
            if len(example.split()) >= 3:
                yield Item(example, VERB_CLASSES[synset.lexicographer - _FIRST_VERB_FILE], example)
