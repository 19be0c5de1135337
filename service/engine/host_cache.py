"""Copies in host memory of experts that were on the device, bounded in bytes."""

from collections import OrderedDict
from dataclasses import replace

import torch

from service.core import ExpertKey
from service.gating.resident import MatrixFactors, ResidentExpert


class HostCache:
    """Prepared experts in host memory, least recently used out first. Used by one thread.

    It spares reading and preparing an expert whose slot another one took; on a CPU device the slots are in
    host memory themselves, so that a larger pool does the same for less.

    Args:
        max_bytes: most bytes; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._experts: OrderedDict[ExpertKey, ResidentExpert] = OrderedDict()

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._experts

    def get(self, key: ExpertKey) -> ResidentExpert | None:
        """The copy, if it is here; it counts as used now."""
        found = self._experts.get(key)
        if found is not None:
            self._experts.move_to_end(key)
        return found

    def put(self, expert: ResidentExpert) -> None:
        """Keep a copy that is in host memory already; older ones go. One larger than the cache is not kept."""
        self.forget(expert.key)
        if expert.nbytes > self.max_bytes:
            return
        self._experts[expert.key] = expert
        self.used_bytes += expert.nbytes
        while self.used_bytes > self.max_bytes:
            _, oldest = self._experts.popitem(last=False)
            self.used_bytes -= oldest.nbytes

    def forget(self, key: ExpertKey) -> None:
        """Drop the copy."""
        expert = self._experts.pop(key, None)
        if expert is not None:
            self.used_bytes -= expert.nbytes


def copied(expert: ResidentExpert, device: torch.device) -> ResidentExpert:
    """The same expert on another device; tensors that are there already are shared."""
    return replace(
        expert,
        matrices={
            name: MatrixFactors(factors.a.to(device), factors.b.to(device))
            for name, factors in expert.matrices.items()
        },
        vectors={name: vector.to(device) for name, vector in expert.vectors.items()},
    )
