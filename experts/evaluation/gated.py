"""Exclusive vectors on a plain model, each row of a batch with gates of its own.

y = W*x + ((x Vᵀ) ⊙ g_row) (U S)ᵀ over the stacked factors of the experts in use: exact for any mix of gates,
because a weighted sum of exclusive vectors is linear.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experts.errors import EvaluationError
from experts.factors import SvdFactors


class GatedModel:
    """Hooks on a model's linear layers; without gates the model is as it was.

    Args:
        model: an HF model; factors are of its parameters.
        experts: for each expert, in the order of the gates' columns, parameter → factors.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Mapping[str, SvdFactors]]) -> None:
        self._experts = experts
        self._gates: Tensor | None = None
        self._active: tuple[int, ...] = ()
        self._stacks: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._modules: dict[str, nn.Linear] = {}
        for name in dict.fromkeys(name for factors in experts for name in factors):
            module = model.get_submodule(name.removesuffix(".weight"))
            if not isinstance(module, nn.Linear):
                raise EvaluationError(f"{name} is not of a linear layer; compress with extras='fold'")
            self._modules[name] = module
        self._hooks = [
            module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def prepare(self, gates: Tensor) -> None:
        """Stack the factors of the experts that (rows, experts) gates use."""
        active = tuple(int(i) for i in gates.ne(0).any(0).nonzero()[:, 0])
        if active == self._active:
            return
        self._active, self._stacks = active, {}
        for name, module in self._modules.items():
            held = [(i, self._experts[i][name]) for i in active if name in self._experts[i]]
            if held:
                dtype = module.weight.dtype
                down = torch.cat([factors.Vh for _, factors in held]).to(dtype)
                up = torch.cat([factors.U.float() * factors.S for _, factors in held], dim=1).to(dtype)
                owner = torch.tensor([i for i, factors in held for _ in range(factors.rank)])
                self._stacks[name] = down, up, owner

    @contextlib.contextmanager
    def rows(self, gates: Tensor | None) -> Iterator[None]:
        """The rows of the passes inside have these gates, (rows, experts); `prepare` saw all of them."""
        self._gates = gates
        try:
            yield
        finally:
            self._gates = None

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            """x: (rows, tokens, in) → (rows, tokens, out)."""
            if self._gates is None or name not in self._stacks:
                return output
            down, up, owner = self._stacks[name]
            gates = self._gates[:, owner].to(down.dtype)[:, None]
            return output + nn.functional.linear(nn.functional.linear(inputs[0], down) * gates, up)

        return add
