"""What matters for merging at scale (arXiv 2410.03617): methods × experts × draws × bases, held-in and held-out.

A draw (seed) is an order of the pool; its first 2, 4, … experts are merged, so a larger merge holds the smaller ones.
Hyper-parameters are tuned for every merge on the validation questions of its own experts' tasks.
"""

import random

from experts.compression import CompressionSpec
from experts.evaluation.jobs import Job
from experts.evaluation.runner import Unit
from experts.evaluation.setting import Setting
from experts.evaluation.studies.grids import grid
from experts.evaluation.studies.options import Options, Settings
from experts.evaluation.systems import Adapter, RouterPlan, Static, System, Twin
from experts.merging import TaskArithmetic

STUDY = "scale"
METHODS = ("averaging", "task-arithmetic", "ties", "dare-ties", "tsv", "iso-c")


def plan(settings: Settings, options: Options) -> list[Unit]:
    """Every cell; a base's smallest merges come first, so that a run that is cut short still compares."""
    units: list[Unit] = []
    for number in options.counts:
        for seed in range(options.seeds):
            for setting in settings.values():
                if number <= len(setting.experts):
                    units += _merges(setting, options, number, seed)
    return units


def draw(setting: Setting, number: int, seed: int) -> tuple[str, ...]:
    """The experts of a merge."""
    order = sorted(setting.experts)
    random.Random(seed).shuffle(order)  # noqa: S311 - a draw, not a secret
    return tuple(sorted(order[:number]))


def _merges(setting: Setting, options: Options, number: int, seed: int) -> list[Unit]:
    chosen = draw(setting, number, seed)
    every = (*chosen, *setting.held_out())

    def job(row: str, tasks: tuple[str, ...], *candidates: System) -> Job:
        return Job(
            STUDY, setting.name, row, candidates, chosen, tasks, options.items, options.validation, seed
        )

    units: list[Unit] = [
        (job(method, every, *(Static(method=each) for each in grid(method, seed))),) for method in METHODS
    ]
    shared = TaskArithmetic(scale=options.scale)
    twin = Twin(shared=shared, compression=CompressionSpec(rank=options.rank))
    router = RouterPlan(prompts=options.prompts, guard=options.guard, seed=seed)
    units.append((
        job("Twin, oracle", chosen, twin),
        job("Twin, router", every, twin.model_copy(update={"router": router})),
    ))  # fmt: skip
    for name in setting.adapters:
        if number == max(options.counts) and seed == 0:
            units.append((job(name, tuple(setting.tasks), Adapter(name=name)),))
    return units
