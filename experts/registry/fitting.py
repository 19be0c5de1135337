"""Router kinds by name: features of prompts → a router; weights alone → a data-free one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from experts.checkpoint import Checkpoint
from experts.errors import RoutingError
from experts.registry.responses import Task, responses
from experts.routing import FeatureSpec, MlpRouter, Router, extract_features, render_prompts
from experts.routing.gaussian import GaussianRouter
from experts.routing.loading import load_model, load_tokenizer
from experts.routing.nearest import NearestRouter
from experts.routing.neutral import neutral_prompts
from experts.routing.staged import StagedRouter
from experts.routing.subspace import GUARD_RATE, SubspaceRouter
from experts.routing.training import CONSTANT, Pace

Kind = Literal["mlp", "gaussian", "nearest", "staged", "subspace"]
"""What `build --router` takes, but for "none"."""


@dataclass(frozen=True, slots=True)
class Background:
    """What the shared expert makes of prompts that are nobody's, by one FeatureSpec.

    Attributes:
        features: (neutral prompts × forms, d) float32, in the order of `render_prompts`.
        forms: consecutive rows that come from one prompt.
    """

    features: Tensor
    forms: int


def fit_router(
    kind: Kind | Literal["none"],
    training: Mapping[str, Tensor],
    validation: Mapping[str, Tensor],
    spec: FeatureSpec,
    *,
    top_k: int = 2,
    threshold: float = 0.05,
    seed: int = 0,
    pace: Pace = CONSTANT,
    guard_rate: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Router:
    """A router of a kind that learns from prompts, on expert → features (n, d) of two disjoint splits.

    Args:
        pace: of the kinds that learn by steps, mlp and staged.
        guard_rate: share of held-out prompts that its guard may leave out; None: it never abstains. A staged
            router's stages have guards of their own.

    Raises:
        RoutingError: the kind takes no prompts, or the features cannot be used.
    """
    if kind == "mlp":
        return MlpRouter.fit(
            training,
            validation,
            spec,
            top_k=top_k,
            threshold=threshold,
            seed=seed,
            pace=pace,
            guard_rate=guard_rate,
            progress=progress,
        )
    if kind == "gaussian":
        return GaussianRouter.fit(
            training, validation, spec, top_k=top_k, threshold=threshold, guard_rate=guard_rate
        )
    if kind == "nearest":
        return NearestRouter.fit(
            training, validation, spec, top_k=top_k, threshold=threshold, guard_rate=guard_rate
        )
    if kind == "staged":

        def stage(train: Mapping[str, Tensor], held: Mapping[str, Tensor], part: FeatureSpec) -> Router:
            return MlpRouter.fit(train, held, part, seed=seed, pace=pace, guard_rate=guard_rate)

        return StagedRouter.fit(
            training, validation, spec, coarse=stage, fine=stage, top_k=top_k, threshold=threshold
        )
    raise RoutingError(f"router kind {kind!r} is not fitted on prompts; choose another")


def subspace_router(
    tasks: Mapping[str, Task],
    shared_path: Path,
    spec: FeatureSpec,
    *,
    training: Mapping[str, Tensor] | None = None,
    validation: Mapping[str, Tensor] | None = None,
    top_k: int = 2,
    threshold: float = 0.05,
    guard_rate: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SubspaceRouter:
    """A data-free router over experts by their task vectors; those that have features are known by them.

    Reads neutral prompts with the shared expert, which it loads. It reads every layer below the last, unless
    `spec` has taps.

    Args:
        tasks: expert → its δ, for all experts without features.
        training, validation: expert → features (n, d), of experts that have prompts.
        guard_rate: of the router that knows these; 1 % if not given, since it has to abstain.
    """
    known: Router | None = None
    if training and validation:
        known = GaussianRouter.fit(
            training, validation, spec, guard_rate=GUARD_RATE if guard_rate is None else guard_rate
        )
    # What is known by prompts at the end of the model cannot stand beside layers below it.
    wide = spec if known and spec.layer == -1 else every_layer(spec, Checkpoint.open(shared_path))
    return by_weights(
        tasks,
        shared_path,
        wide,
        known=known,
        top_k=top_k,
        threshold=threshold,
        progress=progress,
    )


def every_layer(spec: FeatureSpec, shared: Checkpoint) -> FeatureSpec:
    """The spec with every layer below the last; as it is where it has taps, or a layer that is not there.

    Which layer tells two experts apart differs from pair to pair, and without prompts nobody knows which.
    """
    layers = shared.config.get("num_hidden_layers")
    if spec.taps or not isinstance(layers, int) or layers < 2 or spec.layer >= layers:
        return spec
    return spec.model_copy(update={"layer": layers - 1, "taps": tuple(range(1, layers - 1))})


def by_weights(
    tasks: Mapping[str, Task],
    shared_path: Path,
    spec: FeatureSpec,
    *,
    known: Router | None,
    top_k: int,
    threshold: float,
    background: Background | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SubspaceRouter:
    """A data-free router around one that knows other experts by their prompts, or around none.

    Args:
        tasks: expert → its δ.
        background: by that spec; if not given, the shared expert is loaded to take it.
    """
    shared = Checkpoint.open(shared_path)
    # Before anything is loaded, since a layer may not exist.
    rows = {name: responses(task, shared, spec.read) for name, task in tasks.items()}
    seen = background or neutral_background(shared_path, spec, progress)
    return SubspaceRouter.of(
        rows, seen.features, spec, forms=seen.forms, known=known, top_k=top_k, threshold=threshold
    )


def neutral_background(
    shared_path: Path, spec: FeatureSpec, progress: Callable[[int, int], None] | None = None
) -> Background:
    """Features of neutral prompts. Loads the shared expert; a server that runs it takes them from there."""
    tokenizer = load_tokenizer(shared_path)
    prompts = neutral_prompts(tokenizer)
    ids = render_prompts(tokenizer, prompts)
    features = extract_features(load_model(shared_path), ids, spec, progress=progress)
    return Background(features, len(ids) // len(prompts))
