"""A router that chooses different gates for different prompts, without training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from experts.routing import FeatureSpec, extract_features
from tests.fixtures.nearest import NearestCentroid
from tests.fixtures.tiny import VOCABULARY
from tests.model.harness import prompt_ids


def random_router(
    path: Path,
    names: Sequence[str],
    *,
    layer: int,
    pooling: str = "mean",
    max_tokens: int = 512,
    generation: int = 3,
) -> NearestCentroid:
    """The centroids are features of random prompts, one for each name."""
    spec = FeatureSpec(layer=layer, pooling=pooling, max_tokens=max_tokens)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [prompt_ids(900 + index, 12, VOCABULARY) for index in range(len(names))]
    centroids = extract_features(plain, prompts, spec)
    # Distances of these features are large: scaled so that several gates come out above the threshold.
    return NearestCentroid(tuple(names), spec, centroids, generation, top_k=2, threshold=0.0)
