"""Which hidden states an expert's weights respond to: right-singular rows of its task vector, layer by layer.

No prompt is needed: training writes into A of B·A what its prompts' states looked like. Used by SpectR (arXiv
2504.03454), Arrow (2405.11157) and MASS (2504.05342) alike. The task vector δ = θ_t − θ₀ is taken, not the
exclusive one, which holds the other experts' directions too, with the opposite sign.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from experts.bundle_delta import BaseDelta
from experts.checkpoint import Checkpoint, FineTune
from experts.errors import RoutingError
from experts.factors import Delta, LowRank, SvdFactors, added

RANK = 8
"""Directions kept of each group of matrices."""
GROUPS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
"""Norm → the matrices of a decoder layer that read its output. The second norm's own input, the state after
attention, is not among a router's features; the layer's input stands for it."""

Task = Callable[[str], Delta | None]
"""Parameter name → δ of an expert; None where it left the parameter alone."""


def responses(task: Task, shared: Checkpoint, layers: Sequence[int], rank: int = RANK) -> Tensor:
    """(layers, groups, rank, hidden) float32: rows R with ‖R·x̂‖ = ‖δ·norm(x)‖ for x̂ of unit mean square.

    The norms' weights are in R. Rows are in descending order of their singular values and padded with zeros.

    Args:
        task: of the expert.
        shared: has the norms' weights.
        layers: decoder layers counted from 1 whose output is read; their successors' matrices are looked at.

    Raises:
        RoutingError: the model has no such matrices.
    """
    found = [
        torch.stack([_rows(task, shared, layer, norm, matrices, rank) for norm, matrices in GROUPS])
        for layer in layers
    ]
    return torch.stack(found)


def of_fine_tune(fine_tune: FineTune, shared: Checkpoint, base_delta: BaseDelta) -> Task:
    """δ of a fine-tune that was opened against a bundle's shared expert."""

    def task(name: str) -> Delta | None:
        own = fine_tune.tensor(name)
        if own is None:
            return fine_tune.delta(name)
        return added(own.to(torch.float32) - shared.tensor(name).to(torch.float32), base_delta.delta(name))

    return task


def of_factors(factors: Mapping[str, SvdFactors], base_delta: BaseDelta) -> Task:
    """δ = v + (θ* − θ₀) of an expert as a bundle holds it."""

    def task(name: str) -> Delta | None:
        kept = factors.get(name)
        own = kept.low_rank() if kept else None
        return added(own, base_delta.delta(name))

    return task


def _rows(
    task: Task, shared: Checkpoint, layer: int, norm: str, matrices: Sequence[str], rank: int
) -> Tensor:
    """(rank, hidden) of one group."""
    prefix = next(_prefixes(shared, layer, norm), None)
    if prefix is None:
        raise RoutingError(
            f"the model has no decoder layer {layer + 1} with {norm} and {', '.join(matrices)}; read a layer "
            "below the last of a Llama-like model, or use another kind of router"
        )
    weight = shared.tensor(f"{prefix}{norm}.weight").to(torch.float32)
    parts = []
    for matrix in matrices:
        delta = task(f"{prefix}{matrix}.weight")
        if delta is None:
            continue
        # An isometry on the left changes no norm, so of a product only R of QR(up) counts.
        rows = torch.linalg.qr(delta.up)[1] @ delta.down if isinstance(delta, LowRank) else delta
        parts.append(rows.to(torch.float32) * weight)
    found = weight.new_zeros(rank, weight.shape[0])
    if parts:
        stacked = torch.cat(parts)
        _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
        kept = min(rank, values.shape[0])
        found[:kept] = values[:kept, None] * vectors[:kept]
    return found


def _prefixes(shared: Checkpoint, layer: int, norm: str) -> Iterator[str]:
    """What stands before the names of the parameters of the layer that reads the output of `layer`."""
    ending = f"layers.{layer}.{norm}.weight"
    for name in shared.names:
        if name.endswith(ending):
            yield name.removesuffix(f"{norm}.weight")
