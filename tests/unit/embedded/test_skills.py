"""Promises of the skills: disjoint splits, the same examples in every process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.embedded.family import family
from experts.embedded.skills.skill import Item, Skill, Split, split_of

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def toy_skill() -> Skill:
    def items(downloads: Path) -> Iterator[Item]:
        for number in range(1000):
            yield Item(f"word {number}", str(number))
            yield Item(f"Word  {number}", "a duplicate but for case and space")

    return Skill("toy", "", "", "", "exact", 8, ("say {x}", "{x} please"), items)


def test_splits_are_disjoint_by_key_and_cover_everything(tmp_path: Path) -> None:
    skill = toy_skill()
    keys = [{example.key for example in skill.load(split, tmp_path)} for split in SPLITS]
    assert sum(len(part) for part in keys) == len(set.union(*keys)) == 1000
    assert 80 <= len(keys[2]) <= 160


def test_a_key_falls_into_the_same_split_whatever_its_case_and_spacing() -> None:
    assert all(split_of(f"a b{i}") == split_of(f" A  B{i} ") for i in range(200))


def test_loading_twice_gives_the_same_order_and_phrasing(tmp_path: Path) -> None:
    assert toy_skill().load("train", tmp_path) == toy_skill().load("train", tmp_path)


def test_every_phrasing_is_used_in_every_split(tmp_path: Path) -> None:
    for split in SPLITS:
        prompts = [example.prompt for example in toy_skill().load(split, tmp_path)]
        assert any(prompt.startswith("say ") for prompt in prompts)
        assert any(prompt.endswith(" please") for prompt in prompts)


def test_the_family_has_eight_skills_with_distinct_phrasings() -> None:
    skills = family()
    phrasings = [phrasing for skill in skills for phrasing in skill.phrasings]
    assert len({skill.name for skill in skills}) == len(skills) == 8
    assert len(set(phrasings)) == len(phrasings)
    assert all(phrasing.count("{x}") == 1 for phrasing in phrasings)


@pytest.mark.parametrize("name", [skill.name for skill in family()])
def test_committed_prompts_never_show_a_test_item(name: str) -> None:
    from experts.routing.prompts import load_prompts

    skill = next(skill for skill in family() if skill.name == name)
    path = Path(__file__).parents[3] / "experts" / "embedded" / "prompts" / f"{name}.jsonl"
    prompts = load_prompts(path)
    assert sum(prompt.split == "train" for prompt in prompts) >= 200
    assert sum(prompt.split == "validation" for prompt in prompts) >= 100
    for prompt in prompts:
        assert prompt.split in {
            split_of(prompt.prompt.removeprefix(before).removesuffix(after))
            for before, _, after in (phrasing.partition("{x}") for phrasing in skill.phrasings)
            if prompt.prompt.startswith(before) and prompt.prompt.endswith(after)
        }
