"""The settings that `twinserve eval` measures: the shipped eight, and pools of experts on a strong and a weaker base.

Folders below `quality`: `experts/<skill>` on the embedded base, `weak-base` and `weak-experts/<skill>`, `multitask`
and `weak-multitask`. What is not there is left out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experts.embedded.base import ensure_base
from experts.embedded.chat import chat_text
from experts.embedded.extended import extended_family, held_out_tasks
from experts.embedded.family import factors_folder, family
from experts.embedded.skills.skill import Example, Skill
from experts.errors import EvaluationError
from experts.evaluation.setting import RouterTexts, Setting, check_setting, require_disjoint
from experts.evaluation.task import Question, Task

ROUTER_TRAINING = 200
ROUTER_VALIDATION = 60
ROUTER_DEPTH = 16 / 30
"""Part of the decoder layers below what routers read, as in the shipped bundle."""
NAMES = ("embedded", "twenty", "strong", "weak")


class Skills:
    """Skills as tasks and routing prompts, each read once."""

    def __init__(self, tokenizer: Any, downloads: Path, validation: int, test: int) -> None:
        self._tokenizer, self._downloads = tokenizer, downloads
        self._validation, self._test = validation, test
        self._read: dict[str, tuple[Task, RouterTexts]] = {}

    def of(self, skill: Skill) -> tuple[Task, RouterTexts]:
        """The task and what routers see.

        Raises:
            EvaluationError: the skill's splits share an item.
        """
        if skill.name not in self._read:
            train, validation, test = (
                skill.load(split, self._downloads) for split in ("train", "validation", "test")
            )
            require_disjoint(
                skill.name,
                train=[example.key for example in train],
                validation=[example.key for example in validation],
                test=[example.key for example in test],
            )
            task = Task(
                name=skill.name,
                metric=skill.metric,
                max_new_tokens=skill.max_new_tokens,
                validation=self._questions(validation[: self._validation]),
                test=self._questions(test[: self._test]),
            )
            texts = RouterTexts(
                train=self._texts(train[:ROUTER_TRAINING]),
                validation=self._texts(validation[:ROUTER_VALIDATION]),
            )
            self._read[skill.name] = task, texts
        return self._read[skill.name]

    def _questions(self, examples: Sequence[Example]) -> tuple[Question, ...]:
        return tuple(Question(chat_text(self._tokenizer, e.prompt), e.answer) for e in examples)

    def _texts(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return tuple(chat_text(self._tokenizer, e.prompt) for e in examples)


def embedded_settings(
    names: Sequence[str], work: Path, quality: Path, validation: int, test: int
) -> dict[str, Setting]:
    """Those of the named settings that have experts, checked.

    Args:
        names: some of `NAMES`.
        work: folder with the converted base and the downloads.
        quality: folder of the trained experts, see above.
        validation, test: questions of each task.

    Raises:
        EvaluationError: no setting of that name, or one that would mean nothing.
    """
    from transformers import AutoTokenizer

    for name in names:
        if name not in NAMES:
            raise EvaluationError(f"there is no setting {name!r}; choose among {', '.join(NAMES)}")
    base = ensure_base(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    skills = Skills(tokenizer, work / "downloads", validation, test)
    shipped = {skill.name: factors_folder(skill.name) for skill in family()}
    pool = trained(quality / "experts")
    multitask = _present({"multi-task model": quality / "multitask"})
    weak = _present({"multi-task model": quality / "weak-multitask"})
    made = {
        "embedded": (base, shipped, multitask),
        "twenty": (base, {**shipped, **pool}, multitask),
        "strong": (base, pool, multitask),
        "weak": (quality / "weak-base", trained(quality / "weak-experts"), weak),
    }
    settings = {}
    for name in names:
        folder, experts, adapters = made[name]
        if len(experts) > 1 and folder.is_dir():
            settings[name] = _setting(name, folder, experts, adapters, skills, tokenizer)
    return settings


def trained(folder: Path) -> dict[str, Path]:
    """Skill → folder, for each finished expert below `folder`, in training order."""
    return _present({skill.name: folder / skill.name for skill in (*family(), *extended_family())})


def _setting(
    name: str,
    base: Path,
    experts: Mapping[str, Path],
    adapters: Mapping[str, Path],
    skills: Skills,
    tokenizer: Any,
) -> Setting:
    from transformers import AutoConfig

    known = {skill.name: skill for skill in (*family(), *extended_family())}
    read = {expert: skills.of(known[expert]) for expert in experts}
    held_out = {skill.name: skills.of(skill)[0] for skill in held_out_tasks()}
    setting = Setting(
        name=name,
        base=base,
        experts=experts,
        tasks={**{expert: task for expert, (task, _) in read.items()}, **held_out},
        prompts={expert: texts for expert, (_, texts) in read.items()},
        prefix=chat_text(tokenizer, "\0").partition("\0")[0],
        adapters=adapters,
        router_layer=round(ROUTER_DEPTH * int(AutoConfig.from_pretrained(base).num_hidden_layers)),
    )
    check_setting(setting)
    return setting


def _present(folders: Mapping[str, Path]) -> dict[str, Path]:
    return {name: folder for name, folder in folders.items() if (folder / "adapter_config.json").is_file()}
