"""The family's skills as evaluation tasks, their prompts in the base's chat format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experts.embedded.chat import chat_text
from experts.embedded.skills.skill import Example, Skill
from experts.evaluation.task import Question, Task


def family_tasks(
    skills: Sequence[Skill], tokenizer: Any, downloads: Path, validation: int, test: int
) -> tuple[Task, ...]:
    """One task a skill, with so many validation and test questions."""

    def questions(examples: Sequence[Example]) -> tuple[Question, ...]:
        return tuple(
            Question(text=chat_text(tokenizer, example.prompt), answer=example.answer) for example in examples
        )

    return tuple(
        Task(
            name=skill.name,
            metric=skill.metric,
            max_new_tokens=skill.max_new_tokens,
            validation=questions(skill.load("validation", downloads)[:validation]),
            test=questions(skill.load("test", downloads)[:test]),
        )
        for skill in skills
    )
