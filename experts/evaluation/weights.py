"""Writing weight changes into a plain model, always from the pristine weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from experts.factors import Delta, dense


class PatchedModel:
    """A model whose weights become θ₀ + Δ and back; adding and subtracting in place would drift."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._pristine: dict[str, Tensor] = {}

    def apply(self, changes: Iterable[tuple[str, Delta | None]]) -> None:
        """Make every weight θ₀ plus its change, summed in float32; weights without one become θ₀."""
        self.restore()
        with torch.no_grad():
            for name, change in changes:
                if change is None:
                    continue
                parameter = self._parameters[name]
                pristine = self._pristine.setdefault(name, parameter.detach().clone())
                parameter.copy_(pristine.float() + dense(change))

    def restore(self) -> None:
        """Make every weight θ₀ again."""
        with torch.no_grad():
            for name, pristine in self._pristine.items():
                self._parameters[name].copy_(pristine)
