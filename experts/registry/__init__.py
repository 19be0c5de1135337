"""How an expert joins a bundle: validate, compute its exclusive vector, compress; refit the router.

Start reading at `prepare.py`. May import bundle, checkpoint, compression and routing.
"""

from experts.registry.prepare import describe_source, exclusive_vector, prepare_expert
from experts.registry.refit import profile_prompts, refit_router

__all__ = ["describe_source", "exclusive_vector", "prepare_expert", "profile_prompts", "refit_router"]
