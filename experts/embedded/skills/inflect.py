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


def _items(downloads: Path) -> Iterator[Item]:
    path = package_file("lemminflect", "lemminflect==0.2.3", "resources", "infl_lu.csv.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if len(row) != 6 or row[1] != "verb" or not row[0].islower():
                continue
            lemma, _, past, _, participle, third = row
            forms = (third, participle, past)
            if lemma.isascii() and all(form.isalpha() for form in forms):  # skips "a/b" variants
                yield Item(lemma, " ".join(forms))
