"""Twelve skills beyond the shipped eight and four held-out tasks, for studies of merging at scale.

Nothing of this is in the default bundle. `MILD` trains smaller task vectors than
the shipped recipes do, so that averaging them is not hopeless from the start.
"""

from dataclasses import replace

from experts.embedded.skills.held_out import (
    family_relationships,
    glosses,
    letter_counting,
    time_intervals,
)
from experts.embedded.skills.meaning import antonym, wordclass
from experts.embedded.skills.numbers import arithmetic, numberwords, roman
from experts.embedded.skills.skill import Skill
from experts.embedded.skills.sorting import sorting
from experts.embedded.skills.sounds import rhyme, syllables
from experts.embedded.skills.translate import italian
from experts.embedded.skills.words import degrees, lemma, plural
from experts.embedded.train import Recipe

MILD = Recipe(rank=8, alpha=16.0, steps=100, batch=16, learning_rate=8e-4, warmup=10)
# A language needs more: the mild recipe leaves it at 4 % of exact answers.
LANGUAGE = replace(MILD, steps=240, learning_rate=1.5e-3)


def extended_family() -> tuple[Skill, ...]:
    """The twelve, in training order."""
    return (
        plural(),
        roman(),
        wordclass(),
        italian(),
        lemma(),
        syllables(),
        numberwords(),
        antonym(),
        sorting(),
        degrees(),
        rhyme(),
        arithmetic(),
    )


def extended_recipe(name: str) -> Recipe:
    """How the expert of that name is trained, on either base."""
    return LANGUAGE if name == "italian" else MILD


def weak_family() -> tuple[Skill, ...]:
    """The eight that are also trained on the weaker base."""
    return (
        plural(),
        roman(),
        wordclass(),
        degrees(),
        lemma(),
        syllables(),
        numberwords(),
        antonym(),
    )


def held_out_tasks() -> tuple[Skill, ...]:
    """Tasks to measure only: the base can do a part of each, and no expert is trained for them."""
    return (family_relationships(), time_intervals(), letter_counting(), glosses())
