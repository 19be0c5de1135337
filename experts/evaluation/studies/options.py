"""Numbers that all studies share, and the reference that they divide by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from experts.evaluation.jobs import reference
from experts.evaluation.runner import Unit
from experts.evaluation.setting import Setting

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        items: test questions of each task, at most.
        validation: validation questions of each task that tuning reads, at most.
        seeds: draws of experts.
        rank: of Twin's exclusive vectors where a study does not vary it.
        scale: λ of the task arithmetic behind Twin where a study does not tune it.
        counts: numbers of experts merged.
        prompts: router prompts of each expert.
        guard: rate of false abstention at which routers' guards are set; None for no guard.
    """

    items: int = 100
    validation: int = 16
    seeds: int = 3
    rank: int = 8
    scale: float = 0.05
    counts: tuple[int, ...] = (8, 4, 2, 6)
    prompts: int = 60
    guard: float | None = 0.01


def references(settings: Settings, options: Options) -> list[Unit]:
    """Base and experts alone on every task, both splits: what the other studies need first."""
    units: list[Unit] = []
    for setting in settings.values():
        base = reference(setting.name, "base", options.items, options.validation)
        units.append((replace(base, tasks=tuple(setting.tasks)),))
        expert = reference(setting.name, "expert", options.items, options.validation)
        for names in _halves(list(setting.experts)):
            units.append((replace(expert, tasks=names, splits=("validation", "test")),))
    return units


def _halves(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Two parts, so that two workers share them; empty ones are left out."""
    middle = (len(names) + 1) // 2
    return [part for part in (tuple(names[:middle]), tuple(names[middle:])) if part]
