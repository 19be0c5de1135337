"""Routers that choose different gates for different prompts, without training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from experts.routing import FeatureSpec, extract_features
from experts.routing.certainty import StageRecord
from experts.routing.features import narrowed
from experts.routing.staged import StagedRouter, first_tap
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
    taps: tuple[int, ...] = (),
    generation: int = 3,
) -> NearestCentroid:
    """The centroids are features of random prompts, one for each name."""
    spec = FeatureSpec(layer=layer, pooling=pooling, max_tokens=max_tokens, taps=taps)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [prompt_ids(900 + index, 12, VOCABULARY) for index in range(len(names))]
    centroids = extract_features(plain, prompts, spec)
    # Distances of these features are large: scaled so that several gates come out above the threshold.
    return NearestCentroid(tuple(names), spec, centroids, generation, top_k=2, threshold=0.0)


def random_staged(
    path: Path,
    names: Sequence[str],
    prompts: Sequence[Sequence[int]],
    *,
    layer: int,
    tap: int,
    settled: int,
    pooling: str = "mean",
) -> StagedRouter:
    """Random stages of which the coarse one settles exactly `settled` of the prompts."""
    fine = random_router(path, names, layer=layer, taps=(tap,), pooling=pooling)
    coarse = random_router(path, names, layer=tap, pooling=pooling)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    shallow = narrowed(extract_features(plain, prompts, fine.spec), fine.spec, first_tap(fine.spec))
    confidence = sorted(coarse.probabilities(shallow).max(1).values.tolist(), reverse=True)
    # Between two neighbours, so that rounding in the engine cannot change who settles.
    ends = (1.0, *confidence, 0.0)
    certainty = (ends[settled] + ends[settled + 1]) / 2
    record = StageRecord(features=0, settled=0, coarse=0, fine=0, staged=0)
    return StagedRouter(coarse, fine, fine.spec, 3, 2, 0.0, certainty, 0.0, 0.0, {}, record)
