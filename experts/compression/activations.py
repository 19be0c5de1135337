"""What each linear layer sees: second moments of its inputs over calibration texts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from experts.errors import CompressionError

Form = Literal["diagonal", "full"]


@torch.inference_mode()
def activation_statistics(
    model: nn.Module,
    ids_batches: Iterable[Sequence[Sequence[int]]],
    form: Form = "diagonal",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Mean second moments of the inputs of every `nn.Linear`.

    Args:
        model: a causal language model in evaluation mode.
        ids_batches: batches of token ids, each text unpadded.
        form: "diagonal" holds E[x²], (in,) for a layer; "full" holds E[x xᵀ], (in, in), where layers that are
            given the very same tensor (query, key and value, say) share one matrix.
        progress: called with the number of batches that are done.

    Returns:
        Parameter name ("….weight") → float32. Layers of other kinds, GPT-2's Conv1D for one, have no entry.

    Raises:
        CompressionError: there are no tokens, or activations are not finite.
    """
    gathering = _Gathering(form)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_pre_hook(gathering.hook(f"{name}.weight")) for name, module in layers.items()
    ]
    try:
        for done, batch in enumerate(ids_batches, start=1):
            gathering.run(model, batch)
            if progress is not None:
                progress(done)
    finally:
        for hook in hooks:
            hook.remove()
    return gathering.means()


class _Gathering:
    """Sums by layer; a step's inputs are told apart by identity, so that shared ones are multiplied once."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._mask = torch.empty(0)
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._owner: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None

    def run(self, model: nn.Module, batch: Sequence[Sequence[int]]) -> None:
        """One forward pass, padded on the right: attention is causal, so padding changes no real token."""
        width = max((len(ids) for ids in batch), default=0)
        if not width:
            return
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        self._mask = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
            self._mask[row, : len(ids)] = True
        self._count += int(self._mask.sum())
        self._last = None
        model(input_ids=tokens, use_cache=False)

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook that adds one layer's inputs."""

        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0]
            if self._last is not None and self._last[0] is inputs:
                self._owner[name] = self._last[1]
                return
            self._last = (inputs, name)
            self._owner[name] = name
            real = inputs[self._mask].to(torch.float32)
            moments = real.square().sum(dim=0) if self._form == "diagonal" else real.T @ real
            self._sums[name] = self._sums[name] + moments if name in self._sums else moments

        return add

    def means(self) -> dict[str, Tensor]:
        """The sums over the number of tokens."""
        if not self._count:
            raise CompressionError("there are no tokens to take activation statistics on; give prompts")
        means = {name: total / self._count for name, total in self._sums.items()}
        for name, moments in means.items():
            if not torch.isfinite(moments).all():
                raise CompressionError(f"the inputs of {name} are not finite; run the model in float32")
        return {name: means[owner] for name, owner in self._owner.items()}
