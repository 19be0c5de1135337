"""The gated forms of a model's layers: the layer's own output plus the exclusive part.

Each takes the place of one module's ``forward`` on that instance alone, so the module tree, its
parameters and its state_dict stay those of the plain HF model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.gating.sites import norm_epsilon
from service.gating.working_set import MatrixBuffer, VectorBuffer


@dataclass(slots=True)
class GateTensors:
    """The gates of some tokens of a packed step, in packing order.

    Attributes:
        rows: for every rank layout of the working set, (tokens, factor rows); float32 if `fine`.
        experts: (tokens, segments) in the model's dtype.
        fine: multiply with the float32 factors.
    """

    rows: list[Tensor]
    experts: Tensor
    fine: bool


@dataclass(slots=True)
class StepState:
    """What every gated layer reads during one forward pass.

    Attributes:
        gates: of all tokens; None while no sequence of the step is gated, and the layers do nothing extra.
        kept: of the tokens whose logits are kept; None likewise.
        probe_tokens: set during the probing pass, in which norms learn which axis holds the tokens.
    """

    gates: GateTensors | None = None
    kept: GateTensors | None = None
    probe_tokens: int | None = None
    problems: list[str] = field(default_factory=list)


class GatedLinear:
    """y = W*x + b + (g ⊙ xAᵀ)·B + g·Δb for a linear layer or the head.

    Args:
        base: (tokens, in) → (tokens, out), always a fresh tensor.
    """

    __slots__ = ("base", "bias", "kept", "matrix", "state")

    def __init__(
        self,
        base: Callable[[Tensor], Tensor],
        matrix: MatrixBuffer,
        bias: VectorBuffer | None,
        state: StepState,
        *,
        kept: bool,
    ) -> None:
        self.base = base
        self.matrix = matrix
        self.bias = bias
        self.state = state
        self.kept = kept

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        y = self.base(flat)
        gates = self.state.kept if self.kept else self.state.gates
        if gates is not None:
            if self.matrix.rows:
                _add_mix(y, flat, self.matrix, gates)
            if self.bias is not None and self.bias.stacked is not None:
                y.addmm_(gates.experts, self.bias.stacked)
        return y.view(*x.shape[:-1], y.shape[-1])


def _add_mix(y: Tensor, x: Tensor, matrix: MatrixBuffer, gates: GateTensors) -> None:
    """y (tokens, out) += (g ⊙ xAᵀ)·B, in place."""
    if gates.fine and matrix.fine is not None:
        hidden = F.linear(x.to(torch.float32), _used(matrix.fine.a))
        hidden *= gates.rows[matrix.layout]
        y += torch.mm(hidden, _used(matrix.fine.b))
    else:
        hidden = F.linear(x, _used(matrix.native.a))
        hidden *= gates.rows[matrix.layout]
        y.addmm_(hidden, _used(matrix.native.b))


def _used(rows: Tensor | None) -> Tensor:
    assert rows is not None, "factors read before they were packed"
    return rows


class GatedEmbedding:
    """E*[ids] + scale · (g ⊙ B[:, ids]ᵀ)·A: rows of a low-rank difference of the table."""

    __slots__ = ("forward", "matrix", "module", "state")

    def __init__(self, module: nn.Module, matrix: MatrixBuffer, state: StepState) -> None:
        self.module = module
        self.forward = module.forward
        self.matrix = matrix
        self.state = state

    def __call__(self, ids: Tensor) -> Tensor:
        """(1, tokens) integer → (1, tokens, hidden)."""
        out: Tensor = self.forward(ids)
        gates, matrix = self.state.gates, self.matrix
        if gates is None or not matrix.rows:
            return out
        table = _used(matrix.native.b).index_select(1, ids.reshape(-1)).t()
        extra = (table * gates.rows[matrix.layout].to(table.dtype)) @ _used(matrix.native.a)
        scale = getattr(self.module, "embed_scale", None)
        if scale is not None:
            extra = extra * scale
        return out + extra.view_as(out)


class GatedNorm:
    """norm(x) + x̂ · g·Δγ + g·Δβ, with x̂ the normalised input before the affine part.

    q and k norms see four axes, with heads before or after the tokens depending on the family; which
    axis holds the tokens is learned in the probing pass.
    """

    __slots__ = ("bias", "epsilon", "forward", "is_layer_norm", "state", "token_axis", "weight")

    def __init__(
        self, module: nn.Module, weight: VectorBuffer, bias: VectorBuffer | None, state: StepState
    ) -> None:
        self.forward = module.forward
        self.epsilon = norm_epsilon(module)
        self.is_layer_norm = isinstance(module, nn.LayerNorm)
        self.weight = weight
        self.bias = bias
        self.state = state
        self.token_axis = 1

    def __call__(self, x: Tensor) -> Tensor:
        """(1, tokens, dim), (1, tokens, heads, dim) or (1, heads, tokens, dim) → the same shape."""
        out: Tensor = self.forward(x)
        if self.state.probe_tokens is not None:
            self._learn_axis(x)
        gates = self.state.gates
        if gates is None or (
            self.weight.stacked is None and (self.bias is None or self.bias.stacked is None)
        ):
            return out
        shape = [1] * x.dim()
        shape[self.token_axis] = x.shape[self.token_axis]
        shape[-1] = x.shape[-1]
        if self.weight.stacked is not None:
            delta = (gates.experts @ self.weight.stacked).view(shape)
            out = out + self._normalised(x) * delta
        if self.bias is not None and self.bias.stacked is not None:
            out = out + (gates.experts @ self.bias.stacked).view(shape)
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        if self.is_layer_norm:
            return F.layer_norm(x, x.shape[-1:], None, None, self.epsilon or 0.0)
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (self.epsilon or 0.0))).to(x.dtype)

    def _learn_axis(self, x: Tensor) -> None:
        axes = [axis for axis, size in enumerate(x.shape[:-1]) if size == self.state.probe_tokens]
        if len(axes) == 1:
            self.token_axis = axes[0]
        else:
            self.state.problems.append(
                f"a norm sees input of shape {tuple(x.shape)} with no clear token axis"
            )
