"""The way of the paper's reference code: write W* + Σ g·UΣV into a plain model for each request, then generate.

One request after another at batch 1. Each merge starts from W*, since adding and subtracting in place drifts.
"""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.peers.family import ADAPTERS, Family
from benchmarks.peers.peer import PeerRequest, PeerRun, queued_latencies, verified
from experts.bundle import Bundle
from experts.factors import SvdFactors


class MergePerSample:
    """The bundle's shared expert as a plain `transformers` model, and its exclusive vectors beside it."""

    name = "merge per sample"

    def __init__(self, family: Family) -> None:
        self._family = family
        self._model: Any = None
        self._shared: dict[str, Tensor] = {}
        self._factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> Self:
        bundle = Bundle.open(self._family.bundle)
        model = AutoModelForCausalLM.from_pretrained(bundle.shared_path, dtype=torch.bfloat16)
        self._model = model.train(False)
        self._factors = {name: _products(bundle.expert(name).factors) for name in ADAPTERS}
        touched = {parameter for factors in self._factors.values() for parameter in factors}
        self._shared = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if name in touched
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model, self._shared, self._factors = None, {}, {}

    def run(self, requests: Sequence[PeerRequest], clients: int) -> PeerRun:
        """One request after another; `clients` says how many wait for their turn at once."""
        outputs, finished = [], []
        started = time.perf_counter()
        for request in requests:
            self.merge(request.gates)
            outputs.append(self._generate(request))
            finished.append(time.perf_counter() - started)
        return verified(
            finished[-1],
            queued_latencies(finished, clients),
            [len(output) for output in outputs],
            outputs,
            requests,
        )

    @torch.inference_mode()
    def merge(self, gates: Mapping[str, float]) -> None:
        """Write the weights of one mix into the model: one product over all its experts a matrix."""
        parameters = dict(self._model.named_parameters())
        for name, shared in self._shared.items():
            pairs = [(gate, self._factors[expert][name]) for expert, gate in gates.items()]
            if not pairs:
                parameters[name].copy_(shared)
                continue
            up = torch.cat([left * gate for gate, (left, _) in pairs], dim=1)
            down = torch.cat([right for _, (_, right) in pairs])
            torch.addmm(shared, up, down, out=parameters[name].data)

    @torch.inference_mode()
    def _generate(self, request: PeerRequest) -> list[int]:
        ids = torch.tensor([request.prompt_ids])
        generated = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.new_tokens,
            min_new_tokens=request.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answer: list[int] = generated[0, ids.shape[1] :].tolist()
        return answer


def _products(factors: Mapping[str, SvdFactors]) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter → (U·Σ, V) in bfloat16."""
    return {
        name: ((f.U.float() * f.S).to(torch.bfloat16), f.Vh.to(torch.bfloat16)) for name, f in factors.items()
    }
