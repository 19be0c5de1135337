"""Forms of English words, from `lemminflect`: plurals, base forms of verbs, degrees of adjectives."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experts.embedded.skills.inflect import rows, verbs
from experts.embedded.skills.skill import Item, Skill
from experts.embedded.skills.sounds import syllable_counts

_forms = partial(
    Skill,
    source="lemminflect 0.2.3 (NIH SPECIALIST Lexicon)",
    licence="MIT; SPECIALIST Lexicon terms (free use with attribution)",
    metric="exact",
    max_new_tokens=16,
)


def plural() -> Skill:
    """English noun → its plural."""
    return _forms(
        name="plural",
        description="plural of an English noun",
        phrasings=(
            "Plural: {x}",
            "What is the plural of {x}?",
            "Make {x} plural",
            "More than one {x}",
            "Plural form of: {x}",
        ),
        items=_plurals,
    )


def lemma() -> Skill:
    """Inflected English verb → its base form."""
    return _forms(
        name="lemma",
        description="base form of an inflected English verb",
        phrasings=(
            "Lemma: {x}",
            "What is the base form of {x}?",
            "Lemmatise {x}",
            "Which verb is {x} a form of?",
            "Dictionary form of: {x}",
        ),
        items=_lemmas,
    )


def degrees() -> Skill:
    """English adjective → comparative and superlative."""
    return _forms(
        name="degrees",
        description="comparative and superlative of an English adjective",
        phrasings=(
            "Degrees: {x}",
            "Compare the adjective {x}",
            "Comparative and superlative of {x}",
            "How is {x} compared?",
            "Degrees of comparison of: {x}",
        ),
        items=_degrees,
    )


def _plurals(downloads: Path) -> Iterator[Item]:
    for row in rows("noun"):
        if len(row) == 2 and row[0].isalpha() and row[1].isalpha():
            yield Item(row[0], row[1])


def _lemmas(downloads: Path) -> Iterator[Item]:
    """Forms that belong to one verb only: "found" (find, found) is left out."""
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for verb, forms in verbs():
        for form in forms:
            owners[form].add(verb)
    for form, found in owners.items():
        if len(found) == 1 and form not in found:
            yield Item(form, found.pop())


def _degrees(downloads: Path) -> Iterator[Item]:
    """Adjectives with forms of their own, and those of three syllables, which take "more"."""
    three = {word for word, count in syllable_counts() if count == 3}
    for adjective, comparative, superlative in rows("adj"):
        if comparative.isalpha() and superlative.isalpha():
            yield Item(adjective, f"{comparative} {superlative}")
        elif not comparative and adjective in three:
            yield Item(adjective, f"more {adjective} most {adjective}")
