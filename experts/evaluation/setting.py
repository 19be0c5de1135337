"""What a study is made on: a base, its experts, tasks and routing prompts; checked once, then handed to workers."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experts.errors import EvaluationError
from experts.evaluation.task import Question, Task


@dataclass(frozen=True)
class RouterTexts:
    """Whole texts, chat template included, that a router is fitted on and calibrated with."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One base with everything that is measured on it; plain data.

    Attributes:
        name: in tables and in the store.
        base: folder of θ₀.
        experts: name → folder of a LoRA or full fine-tune; the names are the tasks'.
        tasks: by name; those without an expert are held out.
        prompts: expert → what routers see of it.
        prefix: what all prompts begin with, as text.
        adapters: other fine-tunes of the same base, such as the multi-task model.
        router_layer: decoder layer that routers read.
    """

    name: str
    base: Path
    experts: Mapping[str, Path]
    tasks: Mapping[str, Task]
    prompts: Mapping[str, RouterTexts]
    prefix: str = ""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    router_layer: int = -1

    def held_out(self) -> tuple[str, ...]:
        """Tasks that no expert is for."""
        return tuple(name for name in self.tasks if name not in self.experts)

    def digests(self) -> dict[str, str]:
        """Name → the first digits of a sha256 over the weights of base, experts and adapters."""
        folders = {"": self.base, **self.experts, **self.adapters}
        return {name: _digest(folder) for name, folder in folders.items()}


def check_setting(setting: Setting) -> None:
    """Refuse a setting whose figures would mean nothing.

    Raises:
        EvaluationError: a text is in two splits, or an expert has no task, no folder or no prompts.
    """
    for name, folder in {**setting.experts, **setting.adapters}.items():
        if not folder.is_dir():
            raise EvaluationError(
                f"{setting.name}: expert {name} has no folder {folder}; train it or leave it out"
            )
    for name in setting.experts:
        if name not in setting.tasks or name not in setting.prompts:
            raise EvaluationError(
                f"{setting.name}: expert {name} has no task or no routing prompts of its name"
            )
    routing = {
        split: {_plain(text) for texts in setting.prompts.values() for text in getattr(texts, split)}
        for split in ("train", "validation")
    }
    for task in setting.tasks.values():
        test, validation = _texts(task.test), _texts(task.validation)
        both = test & (validation | routing["train"] | routing["validation"]) or validation & routing["train"]
        if both:
            raise EvaluationError(
                f"{setting.name}: task {task.name} has a text in two splits: {min(both)[:80]!r}; "
                "train, validation and test must not share any"
            )


def require_disjoint(name: str, **splits: Iterable[str]) -> None:
    """Refuse splits that share a key.

    Raises:
        EvaluationError: two do; names the key.
    """
    seen: dict[str, str] = {}
    for split, keys in splits.items():
        for key in {_plain(key) for key in keys}:
            if key in seen:
                raise EvaluationError(
                    f"{name}: {key[:80]!r} is in {seen[key]} and in {split}; splits must not share any item"
                )
            seen[key] = split


def _texts(questions: Iterable[Question]) -> set[str]:
    return {_plain(question.text) for question in questions}


def _plain(text: str) -> str:
    """Texts that differ in case or space only are the same input."""
    return " ".join(text.casefold().split())


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:10]
