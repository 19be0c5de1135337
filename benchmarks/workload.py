"""The requests that benchmarks send: random prompts, greedy, a fixed number of tokens, gates by kind."""

import random
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from service.core import GenerationRequest, RoutingChoice, SamplingParams

GateKind = Literal["shared", "one", "top2"]


def prompt(seed: int, length: int, vocabulary: int) -> tuple[int, ...]:
    """Random token ids, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(100, vocabulary, (length,), generator=generator).tolist())


def gates(kind: GateKind, index: int, experts: Sequence[str]) -> Mapping[str, float]:
    """No expert, the same one for all, or a pair that differs from request to request."""
    if kind == "shared":
        return {}
    if kind == "one":
        return {experts[0]: 1.0}
    first, second = random.Random(index).sample(list(experts), 2)
    return {first: 0.75, second: 0.25}


def request(
    index: int, kind: GateKind, experts: Sequence[str], *, length: int, tokens: int, vocabulary: int
) -> GenerationRequest:
    """One request of the workload."""
    return GenerationRequest(
        f"{kind}-{index}-{random.getrandbits(64):x}",
        prompt(index, length, vocabulary),
        SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        RoutingChoice(gates=gates(kind, index, experts)),
    )
