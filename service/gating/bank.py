"""All experts that an engine can mix: resident factors, the working set, the gates of the current step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experts.bundle import ExpertWeights
from service.core import ExpertKey, Pattern
from service.gating.layers import GatedEmbedding, GatedLinear, GatedNorm, GateTensors, StepState
from service.gating.resident import ResidentExpert, make_resident
from service.gating.sites import Site, find_sites
from service.gating.working_set import VectorBuffer, WorkingSet
from service.native import prepack
from service.native.decoder import NativeDecoder

_FINE_WORK = 4096
"""Tokens × factor rows up to which float32 factors beat bfloat16 ones on a CPU: small bfloat16 products
have a floor of about 20 µs, small float32 ones of 2 µs."""

_FINE_ROWS = 96
"""Factor rows up to which they do: beyond, reading twice the bytes costs more than the floor."""


@dataclass(frozen=True, slots=True)
class GatePlan:
    """What `ExpertBank.set_gates` set up."""

    active: int
    repacked: bool


class ExpertBank:
    """Attaches gating to one model and owns its experts. Used by the engine thread only, but for `prepare`.

    Where the compiled decoder computes a parameter, it also adds its exclusive vectors, straight from the
    resident factors. All other parameters are gated inside their HF module, from a packed working set.

    Args:
        model: the shared expert; its module tree and state_dict stay untouched.
        native: the compiled decoder layers of the model.
        pack_base: use packed base products where the processor gains from them.
    """

    def __init__(
        self, model: PreTrainedModel, *, native: NativeDecoder | None = None, pack_base: bool = True
    ) -> None:
        self.dtype = model.dtype
        self.device = model.device
        self.sites = find_sites(model)
        self.state = StepState()
        self._native = native
        self._resident: dict[ExpertKey, ResidentExpert] = {}
        self._slots: dict[ExpertKey, int] = {}
        self._free_slots: list[int] = []
        self._packed_here: set[ExpertKey] = set()
        self._last: tuple[object, ...] | None = None
        cpu_bf16 = self.device.type == "cpu" and self.dtype is torch.bfloat16
        inner = native.parameters if native is not None else frozenset[str]()
        own = [site for site in self.sites if site.weight not in inner]
        self._working = WorkingSet(
            {s.weight for s in own if s.kind != "norm"},
            {s.weight for s in own if s.kind == "norm"} | {s.bias for s in own if s.bias},
            fine=cpu_bf16,
        )
        self._fine = cpu_bf16
        self.packed = pack_base and cpu_bf16 and prepack.available()
        for site in own:
            site.module.forward = self._gated(site)

    def prepare(self, weights: ExpertWeights) -> ResidentExpert:
        """Device tensors of an expert, on any thread. Raises ExpertRejectedError if it does not fit."""
        inner = self._native.parameters if self._native is not None else frozenset[str]()
        return make_resident(weights, self.sites, self.dtype, self.device, inner)

    def add(self, expert: ResidentExpert) -> None:
        """Make an expert available to patterns, between two steps."""
        if expert.key in self._resident:
            self.remove(expert.key)
        if self._native is not None:
            slot = self._free_slots[-1] if self._free_slots else len(self._slots)
            self._native.set_expert(
                slot, {name: (m.a, m.b) for name, m in expert.matrices.items()}, expert.vectors
            )
            if self._free_slots:
                self._free_slots.pop()
            self._slots[expert.key] = slot
        self._resident[expert.key] = expert
        if self._working.touches(expert):
            self._packed_here.add(expert.key)

    def remove(self, key: ExpertKey) -> None:
        """Forget an expert that no request uses any more and give its memory back."""
        self._resident.pop(key, None)
        self._packed_here.discard(key)
        slot = self._slots.pop(key, None)
        if slot is not None and self._native is not None:
            self._clear_gates()
            self._native.drop_expert(slot)
            self._free_slots.append(slot)
        if key in self._working.segments:
            self._working.clear(release=True)
            self._last = None

    def resident(self, key: ExpertKey) -> ResidentExpert | None:
        """The expert's device tensors, if it is here."""
        return self._resident.get(key)

    def mergeable(self, pattern: Pattern) -> bool:
        """Every exclusive vector of the pattern acts inside the compiled layers' matrices alone."""
        return self._native is not None and all(
            key not in self._packed_here and not self._resident[key].vectors for key in pattern.experts
        )

    def set_gates(self, patterns: Sequence[Pattern], tokens: Sequence[int], kept: Sequence[int]) -> GatePlan:
        """Set the gates of the layers to come.

        Args:
            patterns: one for each run of tokens with the same gates, in packing order.
            tokens: how many tokens each run has.
            kept: how many of them keep their logits.

        Raises:
            KeyError: an expert is not resident: a lease was broken.
        """
        key = (tuple(patterns), tuple(tokens), tuple(kept))
        active = frozenset[ExpertKey]().union(*(pattern.experts for pattern in patterns))
        packed = active & self._packed_here if self._native is not None else active
        repacked = self._working.ensure(packed, self._resident).any if packed else False
        if key != self._last or repacked:
            # Not known again before all of it is set: an error in between leaves half of it.
            self._last = None
            if self._native is not None:
                self._mix(self._native, patterns, tokens)
            if packed:
                table = self._table(patterns)
                self.state.gates = self._gate_tensors(table, tokens)
                self.state.kept = self._gate_tensors(table, kept)
            else:
                self.state.gates = self.state.kept = None
            self._last = key
        return GatePlan(len(active), repacked)

    @contextmanager
    def after_layers(self, *, kept: bool) -> Iterator[None]:
        """What stands behind the decoder layers sees the kept tokens alone, or routed prompts without gates."""
        held = self.state.gates
        self.state.gates = self.state.kept if kept else None
        try:
            yield
        finally:
            self.state.gates = held

    @contextmanager
    def at(self, tokens: Sequence[int]) -> Iterator[None]:
        """What stands behind the decoder layers, but for the head, sees these tokens of the step alone."""
        held = self.state.gates
        if held is not None:
            rows = torch.tensor(tokens, device=self.device)
            self.state.gates = GateTensors(
                [gates.index_select(0, rows) for gates in held.rows],
                held.experts.index_select(0, rows),
                held.fine,
            )
        try:
            yield
        finally:
            self.state.gates = held

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

    @property
    def nbytes(self) -> int:
        """Bytes of all resident factors and of the packed copies."""
        return sum(expert.nbytes for expert in list(self._resident.values())) + self._working.nbytes

    def _clear_gates(self) -> None:
        self.state.gates = self.state.kept = None
        self._last = None
        if self._native is not None:
            self._native.mix([], [])

    def _mix(self, native: NativeDecoder, patterns: Sequence[Pattern], tokens: Sequence[int]) -> None:
        uses: list[tuple[int, int, int]] = []
        gates: list[float] = []
        begin = 0
        for pattern, count in zip(patterns, tokens, strict=True):
            for key, weight in pattern.gates:
                uses.append((self._slots[key], begin, begin + count))
                gates.append(weight)
            begin += count
        native.mix(uses, gates)

    def _table(self, patterns: Sequence[Pattern]) -> Tensor:
        """(sequences, segments) float32 gates."""
        column = {key: index for index, key in enumerate(self._working.segments)}
        table = torch.zeros(len(patterns), len(column))
        for row, pattern in enumerate(patterns):
            for key, weight in pattern.gates:
                if key in column:
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
