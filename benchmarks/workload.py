"""The requests that benchmarks send: random prompts, greedy, a fixed number of tokens, gates by kind.

Imports no torch, so that a load generator in a process of its own starts quickly and stays small.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, permutations
from pathlib import Path
from typing import Literal

from service.core import GenerationRequest, RoutingChoice, SamplingParams

GateKind = Literal["none", "one", "same", "top2", "three", "all", "routed"]

MEANING: Mapping[GateKind, str] = {
    "none": "no gates",
    "one": "one expert with weight 1, the same for every row",
    "same": "two experts with weights 0.75 and 0.25, the same for every row",
    "top2": "every row its own pair of experts with weights 0.75 and 0.25",
    "three": "every row its own three experts with weights 0.5, 0.3 and 0.2",
    "all": "every row all experts, with weights of its own",
    "routed": "the router chooses",
}

_FIRST_TOKEN = 100
"""Below are special tokens."""

_MOST_TUPLES = 4096
_serial = count()


@dataclass(frozen=True, slots=True)
class Load:
    """A kind of request.

    Attributes:
        experts: whom gates may name.
        vocabulary: token ids are below it.
        prompt_tokens: of each prompt; a pair (least, most) draws a length for each request.
    """

    experts: Sequence[str]
    vocabulary: int
    kind: GateKind = "top2"
    prompt_tokens: int | tuple[int, int] = 128
    new_tokens: int = 64

    def prompt(self, index: int, salt: int) -> tuple[int, ...]:
        """Random token ids, others for every (index, salt), so that no cache knows them."""
        draw = random.Random(f"{index}/{salt}")
        wanted = self.prompt_tokens
        length = wanted if isinstance(wanted, int) else draw.randint(*wanted)
        return tuple(draw.choices(range(_FIRST_TOKEN, self.vocabulary), k=length))

    def gates(self, index: int) -> Mapping[str, float] | None:
        """The gates of the request with that number; None asks the router."""
        experts = self.experts
        if self.kind == "none":
            return {}
        if self.kind == "one":
            return {experts[0]: 1.0}
        if self.kind == "same":
            return {experts[0]: 0.75, experts[1]: 0.25}
        if self.kind == "top2":
            return dict(zip(_distinct(experts, 2, index), (0.75, 0.25), strict=True))
        if self.kind == "three":
            return dict(zip(_distinct(experts, 3, index), (0.5, 0.3, 0.2), strict=True))
        if self.kind == "all":
            raw = [1.0 + (place + index) % len(experts) for place in range(len(experts))]
            return {name: weight / sum(raw) for name, weight in zip(experts, raw, strict=True)}
        return None

    def requests(self, number: int, salt: int = 0) -> list[GenerationRequest]:
        """That many requests; another `salt` gives other prompts with the same gates."""
        return [
            GenerationRequest(
                f"{self.kind}-{next(_serial)}",
                self.prompt(index, salt),
                SamplingParams(max_tokens=self.new_tokens, temperature=0.0, ignore_eos=True),
                RoutingChoice(gates=self.gates(index)),
            )
            for index in range(number)
        ]


def vocabulary_of(model: Path) -> int:
    """Token ids of a model's folder are below it."""
    found: int = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return found


def _distinct(experts: Sequence[str], size: int, index: int) -> tuple[str, ...]:
    found = _tuples(tuple(experts), size)
    return found[index % len(found)]


@cache
def _tuples(experts: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    """Ordered choices of `size` experts, in random order: as many different ones as there are, or plenty."""
    draw = random.Random(0)
    if len(experts) <= 16:
        every = list(permutations(experts, size))
        draw.shuffle(every)
        return every[:_MOST_TUPLES]
    return list(dict.fromkeys(tuple(draw.sample(experts, size)) for _ in range(_MOST_TUPLES)))
