"""Features and routers (one a file): fit, score, gates, save and load; calibration.

`features.py` says exactly which numbers a router sees, `router.py` what a router is, `mlp.py` is the paper's,
`kinds.py` how others add theirs, `gates.py` turns probabilities into gates. Imports nothing of ours but errors.
"""

from experts.routing.features import FeatureSpec, decoder_layers, extract_features, pool
from experts.routing.gates import QUANTUM, select_gates
from experts.routing.kinds import load_router, router_kinds
from experts.routing.mlp import MlpRouter
from experts.routing.prompts import RoutingPrompt, load_prompts, prompt_forms, render_prompts
from experts.routing.router import Router, among

__all__ = [
    "QUANTUM",
    "FeatureSpec",
    "MlpRouter",
    "Router",
    "RoutingPrompt",
    "among",
    "decoder_layers",
    "extract_features",
    "load_prompts",
    "load_router",
    "pool",
    "prompt_forms",
    "render_prompts",
    "router_kinds",
    "select_gates",
]
