"""`transformers.generate` on a plain model: bfloat16, SDPA, greedy, its own KV cache."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria

from service.core import GenerationRequest


@dataclass(frozen=True, slots=True)
class GenerateRun:
    """What one batch took.

    Attributes:
        seconds: of the whole call.
        steps: seconds between two tokens, the prefill left out.
    """

    seconds: float
    steps: list[float]


class PlainGenerate:
    """The shared expert without gates, as anybody would run it."""

    def __init__(self, path: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self._model.train(False)

    @torch.inference_mode()
    def run(self, requests: Sequence[GenerationRequest]) -> GenerateRun:
        """All requests as one batch; their gates are ignored, their prompts must be equally long."""
        ids = torch.tensor([request.prompt_ids for request in requests])
        (tokens,) = {request.sampling.max_tokens for request in requests}
        stamps = _Stamps()
        started = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[stamps],
        )
        seconds = time.perf_counter() - started
        return GenerateRun(seconds, [b - a for a, b in pairwise(stamps.times)])


class _Stamps(StoppingCriteria):
    """Never stops; notes when it is asked, which is once after every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)  # type: ignore[return-value]
