"""What `twinserve embedded train --family` can train: which lessons, how, on which base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.embedded.extended import extended_family, extended_recipe, weak_family
from experts.embedded.family import Family, family
from experts.embedded.multitask import MULTITASK, Mixture
from experts.embedded.skills.skill import Lesson
from experts.embedded.train import Recipe, shipped_recipe

QUALITY = Path(".twinserve/quality")
WEAKER_BASE = QUALITY / "weak-base"


@dataclass(frozen=True)
class Course:
    """Lessons of one family: the folder their experts go to, a recipe by name, and the base."""

    lessons: Sequence[Lesson]
    target: Path
    recipe: Callable[[str], Recipe]
    on_weaker_base: bool = False


def course(chosen: Family) -> Course:
    """The course of a family."""
    if chosen is Family.SHIPPED:
        return Course(family(), Path("experts/embedded/factors"), shipped_recipe)
    if chosen is Family.EXTENDED:
        return Course(extended_family(), QUALITY / "experts", extended_recipe)
    if chosen is Family.WEAK:
        return Course(weak_family(), QUALITY / "weak-experts", extended_recipe, on_weaker_base=True)
    if chosen is Family.MULTITASK:
        lesson = Mixture("multitask", (*family(), *extended_family()))
        return Course((lesson,), QUALITY, lambda _: MULTITASK)
    lesson = Mixture("weak-multitask", weak_family())
    return Course((lesson,), QUALITY, lambda _: MULTITASK, on_weaker_base=True)
