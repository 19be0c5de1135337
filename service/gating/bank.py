"""All experts that an engine can mix: resident factors, the working set, the gates of the current step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experts.bundle import ExpertWeights
from service.core import ExpertKey, Pattern, StepMode
from service.gating import prepack
from service.gating.layers import GatedEmbedding, GatedLinear, GatedNorm, GateTensors, StepState
from service.gating.resident import ResidentExpert, make_resident
from service.gating.sites import Site, find_sites
from service.gating.working_set import VectorBuffer, WorkingSet

_FINE_WORK = 4096
"""Tokens × factor rows up to which float32 factors beat bfloat16 ones on a CPU: small bfloat16 products
have a floor of about 20 µs, small float32 ones of 2 µs."""

_FINE_ROWS = 96
"""Factor rows up to which they do: beyond, reading twice the bytes costs more than the floor."""


@dataclass(frozen=True, slots=True)
class GatePlan:
    """What `ExpertBank.begin_step` set up."""

    mode: StepMode
    active: int
    repacked: bool


class ExpertBank:
    """Attaches gating to one model and owns its experts. Used by the engine thread only, but for `prepare`.

    Args:
        model: the shared expert; its module tree and state_dict stay untouched.
        pack_base: use packed base products where the processor gains from them.
    """

    def __init__(self, model: PreTrainedModel, *, pack_base: bool = True) -> None:
        self.dtype = model.dtype
        self.device = model.device
        self.sites = find_sites(model)
        self.state = StepState()
        self._resident: dict[ExpertKey, ResidentExpert] = {}
        self._last: tuple[object, ...] | None = None
        cpu_bf16 = self.device.type == "cpu" and self.dtype is torch.bfloat16
        self._working = WorkingSet(
            {s.weight for s in self.sites if s.kind != "norm"},
            {s.weight for s in self.sites if s.kind == "norm"} | {s.bias for s in self.sites if s.bias},
            fine=cpu_bf16,
        )
        self._fine = cpu_bf16
        self.packed = pack_base and cpu_bf16 and prepack.available()
        for site in self.sites:
            site.module.forward = self._gated(site)

    def prepare(self, weights: ExpertWeights) -> ResidentExpert:
        """Device tensors of an expert, on any thread. Raises ExpertRejectedError if it does not fit."""
        return make_resident(weights, self.sites, self.dtype, self.device)

    def add(self, expert: ResidentExpert) -> None:
        """Make an expert available to patterns, between two steps."""
        self._resident[expert.key] = expert

    def remove(self, key: ExpertKey) -> None:
        """Forget an expert that no request uses any more and give its memory back."""
        self._resident.pop(key, None)
        if key in self._working.segments:
            self._working.clear(release=True)
            self._last = None

    def resident(self, key: ExpertKey) -> ResidentExpert | None:
        """The expert's device tensors, if it is here."""
        return self._resident.get(key)

    def begin_step(self, patterns: Sequence[Pattern], tokens: Sequence[int], kept: Sequence[int]) -> GatePlan:
        """Set the gates of the coming forward pass.

        Args:
            patterns: one for each sequence of the step, in packing order.
            tokens: how many tokens each sequence has in the step.
            kept: how many of them keep their logits (0 or 1).
        """
        active = frozenset[ExpertKey]().union(*(pattern.experts for pattern in patterns))
        if not active:
            self._clear_gates()
            return GatePlan("shared", 0, repacked=False)
        change = self._working.ensure(active, self._resident)
        key = (tuple(patterns), tuple(tokens), tuple(kept))
        if change.any or key != self._last:
            table = self._table(patterns)
            self.state.gates = self._gate_tensors(table, tokens)
            self.state.kept = self._gate_tensors(table, kept)
            self._last = key
        return GatePlan("factored", len(active), change.any)

    def probe(self, tokens: int, forward: Callable[[], object]) -> list[str]:
        """Run one plain pass of `tokens` tokens in which layers learn their axes; returns problems found."""
        self._clear_gates()
        self.state.probe_tokens = tokens
        self.state.problems.clear()
        try:
            forward()
        finally:
            self.state.probe_tokens = None
        return list(self.state.problems)

    @property
    def resident_count(self) -> int:
        """How many expert generations are on the device."""
        return len(self._resident)

    def _clear_gates(self) -> None:
        self.state.gates = self.state.kept = None
        self._last = None

    def _table(self, patterns: Sequence[Pattern]) -> Tensor:
        """(sequences, segments) float32 gates."""
        column = {key: index for index, key in enumerate(self._working.segments)}
        table = torch.zeros(len(patterns), len(column))
        for row, pattern in enumerate(patterns):
            for key, weight in pattern.gates:
                table[row, column[key]] = weight
        return table.to(self.device)

    def _gate_tensors(self, table: Tensor, tokens: Sequence[int]) -> GateTensors:
        rows = self._working.most_rows
        fine = self._fine and rows <= _FINE_ROWS and sum(tokens) * rows <= _FINE_WORK
        of_token = torch.repeat_interleave(torch.tensor(tokens, device=self.device))
        wide = [self._working.spread(table, layout) for layout in self._working.layouts]
        dtype = torch.float32 if fine else self.dtype
        return GateTensors(
            rows=[gates.to(dtype).index_select(0, of_token) for gates in wide],
            experts=table.to(self.dtype).index_select(0, of_token),
            fine=fine,
        )

    def _gated(self, site: Site) -> Callable[[Tensor], Tensor]:
        if site.kind == "norm":
            return GatedNorm(
                site.module, self._working.vectors[site.weight], self._bias(site.bias), self.state
            )
        matrix = self._working.matrices[site.weight]
        if site.kind == "embedding":
            return GatedEmbedding(site.module, matrix, self.state)
        base = prepack.packed(site.module) if self.packed else prepack.plain(site.module)  # type: ignore[arg-type]
        return GatedLinear(base, matrix, self._bias(site.bias), self.state, kept=site.kind == "head")

    def _bias(self, name: str | None) -> VectorBuffer | None:
        return None if name is None else self._working.vectors[name]
