"""A new expert's prompts, or its weights, + what the router kept of the others → a router that knows all of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experts.bundle import Bundle
from experts.errors import RoutingError
from experts.registry.fitting import Background, by_weights
from experts.registry.importing import open_source
from experts.registry.responses import Task, of_fine_tune, readable, responses
from experts.routing import Router, extract_features, render_prompts
from experts.routing.guard import Guarded
from experts.routing.loading import load_model, load_tokenizer
from experts.routing.router import DataFree

MIN_PROMPTS = 8
"""Fewer prompts than this cannot both train and validate."""
VALIDATION_EVERY = 5


def refit_router(
    router: Router, name: str, features: Tensor, *, forms: int = 1, replace: bool = False, seed: int = 0
) -> Router:
    """Refit a router, of whatever kind, with one more expert or with one expert's profile replaced.

    The router kept what it needs of the old experts, so their prompts are not needed. Every fifth prompt of the
    new expert is held out for validation.

    Args:
        router: what the family is routed by now.
        name: the new expert.
        features: (prompts × forms, d) float32, of the bundle's shared expert and the router's FeatureSpec,
            in the order of `render_prompts`.
        forms: consecutive rows that come from one prompt and must stay on one side of the split.
        replace: the expert has a profile already, which these features replace.
        seed: of initialisation and batches.

    Raises:
        RoutingError: too few prompts, a name that the router knows (without `replace`), or features of another
            width.
    """
    if name in router.names and not replace:
        raise RoutingError(f"the router already knows expert {name!r}")
    if features.dim() != 2 or features.shape[0] % forms or features.shape[0] < MIN_PROMPTS * forms:
        raise RoutingError(
            f"features of shape {tuple(features.shape)} for {name!r}; give at least {MIN_PROMPTS} prompts "
            f"in {forms} form(s) each"
        )
    held_out = torch.arange(features.shape[0]) // forms % VALIDATION_EVERY == VALIDATION_EVERY - 1
    return router.refitted(name, features[~held_out], features[held_out], seed)


def join_by_weights(
    router: Router | None, bundle: Bundle, name: str, task: Task, *, background: Background | None = None
) -> Router | None:
    """The router with one more expert of which no prompt is known; None where it cannot take it.

    A data-free router takes it up at once. One that knows its experts by prompts and has a guard stays what it
    is, inside a data-free one that is offered what the guard turns away; it has to read decoder layers below the
    last, of a Llama-like model. Every other kind leaves the expert to requests that name it.

    Args:
        router: what the family is routed by now.
        bundle: the family.
        name: the new expert; one that the router knows by prompts is known by its weights from now on.
        task: its δ; see `experts.registry.responses`.
        background: by the router's spec, where `needs_background`; if not given, the shared expert is loaded.
    """
    if router is None:
        return None
    if isinstance(router, DataFree):
        return router.joined_data_free(name, responses(task, bundle.shared, router.spec.read))
    known = router.without(name)
    if known is None or not _turns_away(router) or not readable(bundle.shared, router.spec.read):
        return None
    return by_weights(
        {name: task},
        bundle.shared_path,
        router.spec,
        known=known,
        top_k=router.top_k,
        threshold=router.threshold,
        background=background,
    )


def task_of(bundle: Bundle, name: str, source: Path) -> Task:
    """δ of the fine-tune in a folder, for `join_by_weights`.

    Raises:
        CheckpointError, MismatchError: the source cannot be read or does not fit.
    """
    return of_fine_tune(open_source(name, source, bundle), bundle.shared, bundle.base_delta)


def needs_background(router: Router | None) -> bool:
    """Whether the first expert that joins this router by its weights needs features of neutral prompts."""
    if router is None or isinstance(router, DataFree):
        return False
    return _turns_away(router) and router.spec.layer != -1


def known_by_prompts(router: Router | None, name: str) -> bool:
    """Whether the router learned the expert from prompts, which a generation that brings none is routed by too."""
    if router is None or name not in router.names:
        return False
    return not (isinstance(router, DataFree) and name in router.free)


def profile_prompts(bundle: Bundle, router: Router, prompts: Sequence[str]) -> tuple[Tensor, int]:
    """Features of prompts on the bundle's shared expert, for `refit_router`, and the forms of each prompt.

    Loads the shared expert; a running server has it loaded and should take the features from there.

    Raises:
        RoutingError: a prompt is empty.
    """
    ids = render_prompts(load_tokenizer(bundle.shared_path), prompts)
    forms = len(ids) // max(len(prompts), 1)
    return extract_features(load_model(bundle.shared_path), ids, router.spec), forms


def _turns_away(router: Router) -> bool:
    return isinstance(router, Guarded) and router.guard is not None
