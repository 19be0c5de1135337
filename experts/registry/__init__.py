"""How an expert joins a bundle: validate, compute its exclusive vector, compress; refit the router.

Start reading at `prepare.py`. May import bundle, checkpoint, compression and routing.
"""

from experts.registry.fitting import Background
from experts.registry.prepare import describe_source, exclusive_vector, prepare_expert
from experts.registry.refit import (
    MIN_PROMPTS,
    join_by_weights,
    known_by_prompts,
    needs_background,
    profile_prompts,
    refit_router,
    task_of,
)

__all__ = [
    "MIN_PROMPTS",
    "Background",
    "describe_source",
    "exclusive_vector",
    "join_by_weights",
    "known_by_prompts",
    "needs_background",
    "prepare_expert",
    "profile_prompts",
    "refit_router",
    "task_of",
]
