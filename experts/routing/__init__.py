"""Features and routers (one a file): fit, score, gates, save and load; calibration.

`features.py` says exactly which numbers a router sees, `router.py` what a router is, `mlp.py` is the paper's,
`kinds.py` how others add theirs, `bandit.py` what feedback changes, `gates.py` turns probabilities into gates.
Imports nothing of ours but errors.
"""

from experts.routing.bandit import SHARED_ARM, Arm, Bandit, BanditSpec, ContextMap, Decision
from experts.routing.drift import Fitted, distance, fitted
from experts.routing.features import FeatureSpec, decoder_layers, extract_features, pool
from experts.routing.gates import QUANTUM, select_gates
from experts.routing.kinds import load_router, router_kinds
from experts.routing.mlp import MlpRouter
from experts.routing.neutral import neutral_prompts
from experts.routing.prompts import RoutingPrompt, load_prompts, prompt_forms, render_prompts
from experts.routing.router import Abstaining, Router, Settling, among, judged

__all__ = [
    "QUANTUM",
    "SHARED_ARM",
    "Abstaining",
    "Arm",
    "Bandit",
    "BanditSpec",
    "ContextMap",
    "Decision",
    "FeatureSpec",
    "Fitted",
    "MlpRouter",
    "Router",
    "RoutingPrompt",
    "Settling",
    "among",
    "decoder_layers",
    "distance",
    "extract_features",
    "fitted",
    "judged",
    "load_prompts",
    "load_router",
    "neutral_prompts",
    "pool",
    "prompt_forms",
    "render_prompts",
    "router_kinds",
    "select_gates",
]
