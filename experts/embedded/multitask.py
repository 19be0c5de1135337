"""One lesson made of many skills: the multi-task expert that merging is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experts.embedded.skills.skill import Example, Skill, Split
from experts.embedded.train import Recipe

MULTITASK = Recipe(rank=32, alpha=64.0, steps=200, batch=32, learning_rate=5e-4, checkpoint_every=25)


@dataclass(frozen=True)
class Mixture:
    """`per_skill` examples of each skill, in turn; a skill that has fewer begins again."""

    name: str
    skills: Sequence[Skill]
    per_skill: int = 1000

    def load(self, split: Split, downloads: Path) -> list[Example]:
        """Skills take turns, so every prefix holds equally many examples of each."""
        pools = [skill.load(split, downloads)[: self.per_skill] for skill in self.skills]
        return [pool[turn % len(pool)] for turn in range(self.per_skill) for pool in pools]
