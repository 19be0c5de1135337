"""Exclusive vectors on an encoder: a padded batch in which every text has gates of its own.

y = W*x + b* + Σ g_t·(U_tΣ_t(V_tᵀx) + Δb_t) for each row, likewise embeddings and norms. The linear and embedding
layers are those of `service.gating`, which see the batch as tokens in a row; the pooler sees one token a text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from experts.bundle import ExpertWeights
from service.core import ExpertKey, Pattern
from service.gating.layers import GatedEmbedding, GatedLinear, GateTensors, StepState
from service.gating.resident import ResidentExpert, make_resident
from service.gating.sites import Site, find_sites
from service.gating.working_set import VectorBuffer, WorkingSet

_POOLER = "pooler."


class GatedEncoder:
    """One encoder with its experts. Used by one thread.

    Args:
        model: the shared encoder in evaluation mode; module tree and state_dict stay untouched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._sites = find_sites(model)
        self._state = StepState()
        self._shape = (1, 1)
        self._resident: dict[ExpertKey, ResidentExpert] = {}
        self._working = WorkingSet(
            {site.weight for site in self._sites if site.kind != "norm"},
            {site.weight for site in self._sites if site.kind == "norm"}
            | {site.bias for site in self._sites if site.bias},
            fine=False,
        )
        for site in self._sites:
            site.module.forward = self._gated(site)

    def add(self, weights: ExpertWeights) -> ExpertKey:
        """Make an expert available to patterns.

        Raises:
            ExpertRejectedError: it does not fit the encoder.
        """
        expert = make_resident(weights, self._sites, self.model.dtype, self.model.device)
        self._resident[expert.key] = expert
        return expert.key

    @property
    def nbytes(self) -> int:
        """Bytes of all experts' tensors."""
        return sum(expert.nbytes for expert in self._resident.values())

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, mask: Tensor, patterns: Sequence[Pattern] | None, *, states: bool = False
    ) -> Any:
        """The encoder's output for right-padded ids and mask (texts, tokens), each text under its pattern.

        Args:
            patterns: one a text; None is the shared encoder for all of them.
            states: keep the hidden states of every layer.

        Raises:
            KeyError: a pattern names an expert that was not added.
        """
        self._shape = (ids.shape[0], ids.shape[1])
        if patterns is not None:
            self._set_gates(patterns)
        try:
            return self.model(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                output_hidden_states=states,
            )
        finally:
            self._state.gates = self._state.kept = None

    def _set_gates(self, patterns: Sequence[Pattern]) -> None:
        active = frozenset[ExpertKey]().union(*(pattern.experts for pattern in patterns))
        if not active:
            return
        self._working.ensure(active, self._resident)
        column = {key: index for index, key in enumerate(self._working.segments)}
        table = torch.zeros(len(patterns), len(column))
        for row, pattern in enumerate(patterns):
            for key, weight in pattern.gates:
                table[row, column[key]] = weight
        table = table.to(device=self.model.device, dtype=self.model.dtype)
        spread = [self._working.spread(table, layout) for layout in self._working.layouts]
        tokens = self._shape[1]
        self._state.gates = GateTensors(
            rows=[gates.repeat_interleave(tokens, dim=0) for gates in spread],
            experts=table.repeat_interleave(tokens, dim=0),
            fine=False,
        )
        self._state.kept = GateTensors(rows=spread, experts=table, fine=False)

    def _gated(self, site: Site) -> Callable[[Tensor], Tensor]:
        vectors = self._working.vectors
        bias = vectors[site.bias] if site.bias else None
        if site.kind == "norm":
            return _GatedNorm(site.module, vectors[site.weight], bias, self._state)
        matrix = self._working.matrices[site.weight]
        if site.kind == "embedding":
            inner = GatedEmbedding(site.module, matrix, self._state)
            # Positions and segments that all texts share come as one row.
            return lambda ids: inner(ids.expand(self._shape))
        return GatedLinear(_plain(site.module), matrix, bias, self._state, kept=site.path.startswith(_POOLER))


class _GatedNorm:
    """norm(x) + x̂ · g·Δγ + g·Δβ over (texts, tokens, hidden)."""

    def __init__(
        self, module: nn.Module, weight: VectorBuffer, bias: VectorBuffer | None, state: StepState
    ) -> None:
        self._forward = module.forward
        self._epsilon = float(module.eps)  # type: ignore[arg-type]
        self._weight = weight
        self._bias = bias
        self._state = state

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._forward(x)
        gates = self._state.gates
        if gates is None:
            return out
        if self._weight.stacked is not None:
            plain = functional.layer_norm(x, x.shape[-1:], None, None, self._epsilon)
            out = out + plain * (gates.experts @ self._weight.stacked).view(x.shape)
        if self._bias is not None and self._bias.stacked is not None:
            out = out + (gates.experts @ self._bias.stacked).view(x.shape)
        return out


def _plain(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward: Callable[[Tensor], Tensor] = module.forward
    return forward
