"""From trained classifiers of the suite to the plan of their bundle, as it is measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experts.classification.base import find_base
from experts.classification.build import ClassifierPlan
from experts.classification.task import ClassificationTask
from experts.classification.train import is_trained
from experts.compression import CompressionSpec
from experts.errors import CheckpointError
from experts.merging.methods import MergeMethod, TaskArithmetic
from experts.routing import FeatureSpec, RoutingPrompt

SCALE = 0.3
RANK = 32
MAX_TEXTS = 1000
"""Training texts of a task that the router learns from, as many as the paper's; a quarter more validate it."""

FEATURES = FeatureSpec(layer=3, taps=(1, 2), pooling="mean")
"""Shallow layers show the form of a text as well as its matter: on validation as good as with the last one."""


def suite_plan(
    tasks: Sequence[ClassificationTask],
    classifiers: Path,
    downloads: Path,
    out: Path,
    *,
    method: MergeMethod | None = None,
    rank: int = RANK,
    max_texts: int = MAX_TEXTS,
    router: bool = True,
    overwrite: bool = False,
) -> ClassifierPlan:
    """The plan of a bundle of trained tasks; the router learns from their training and validation texts alone.

    Raises:
        CheckpointError: the base is not installed, or a task is not trained yet.
    """
    missing = [task.name for task in tasks if not is_trained(classifiers / task.name)]
    if missing:
        raise CheckpointError(
            f"{classifiers} has no trained {', '.join(missing)}; run `twinserve classifier train` first"
        )
    return ClassifierPlan(
        base=find_base(),
        experts={task.name: classifiers / task.name for task in tasks},
        out=out,
        method=method or TaskArithmetic(scale=SCALE),
        compression=CompressionSpec(rank=rank, extras="exact"),
        texts={task.name: routing_texts(task, downloads, max_texts) for task in tasks} if router else {},
        features=FEATURES,
        max_texts=max_texts,
        overwrite=overwrite,
    )


def routing_texts(task: ClassificationTask, downloads: Path, limit: int) -> tuple[RoutingPrompt, ...]:
    """So many training texts of a task and a quarter as many validation texts; never a test text."""
    counts: dict[Literal["train", "validation"], int] = {"train": limit, "validation": max(limit // 4, 1)}
    return tuple(
        RoutingPrompt(prompt=example.text, answer=task.labels[example.label], split=split)
        for split, count in counts.items()
        for example in task.load(split, downloads)[:count]
    )
