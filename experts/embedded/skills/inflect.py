"""English verb → its third person, present participle and past, from `lemminflect`."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

from experts.embedded.skills.packages import package_file
from experts.embedded.skills.skill import Item, Skill


def inflect() -> Skill:
    """The skill; its items are read when it is loaded."""
    return Skill(
        name="inflect",
        description="inflected forms of an English verb",
        source="lemminflect 0.2.3 (NIH SPECIALIST Lexicon)",
        licence="MIT; SPECIALIST Lexicon terms (free use with attribution)",
        metric="exact",
        max_new_tokens=32,
        phrasings=(
            "Inflect: {x}",
            "Forms of {x}",
            "Conjugate {x}",
            "What are the verb forms of {x}?",
            "Inflections of: {x}",
        ),
        items=_items,
    )


def rows(kind: str) -> Iterator[list[str]]:
    """Lower-case ASCII lemmas of a word class ("noun", "verb", "adj") with their inflected forms."""
    path = package_file("lemminflect", "lemminflect==0.2.3", "resources", "infl_lu.csv.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for lemma, found, *forms in csv.reader(file):
            if found == kind and lemma.islower() and lemma.isascii():
                yield [lemma, *forms]


def verbs() -> Iterator[tuple[str, tuple[str, str, str]]]:
    """(lemma, (third person, present participle, past)) of verbs with one form of each."""
    for row in rows("verb"):
        if len(row) != 5:
            continue
        lemma, past, _, participle, third = row
        forms = (third, participle, past)
        if all(form.isalpha() for form in forms):  # skips "a/b" variants
            yield lemma, forms


def _items(downloads: Path) -> Iterator[Item]:
    for lemma, forms in verbs():
        yield Item(lemma, " ".join(forms))
