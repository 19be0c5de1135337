"""Which skills make the embedded family, in training order, and the names of other families."""

from enum import StrEnum
from pathlib import Path

from experts.embedded.skills.category import category
from experts.embedded.skills.inflect import inflect
from experts.embedded.skills.pronounce import pronounce
from experts.embedded.skills.skill import Skill
from experts.embedded.skills.spell import spell
from experts.embedded.skills.stress import stress
from experts.embedded.skills.translate import french, german, spanish


class Family(StrEnum):
    """The families by the names they have on the command line."""

    SHIPPED = "shipped"
    EXTENDED = "extended"
    MULTITASK = "multitask"
    WEAK = "weak"
    WEAK_MULTITASK = "weak-multitask"


def family() -> tuple[Skill, ...]:
    """The eight skills, each with inputs that another skill could also have been asked about."""
    return (
        pronounce(),
        category(),
        spanish(),
        inflect(),
        spell(),
        german(),
        french(),
        stress(),
    )


def factors_folder(name: str) -> Path:
    """The committed PEFT LoRA folder of an expert."""
    return Path(__file__).parent / "factors" / name
