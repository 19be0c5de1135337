"""Which hidden states an expert's weights respond to: right-singular rows of its task vector, layer by layer.

No prompt is needed: training writes into A of B·A what its prompts' states looked like. Used by SpectR (arXiv
2504.03454), Arrow (2405.11157) and MASS (2504.05342) alike. The task vector δ = θ_t − θ₀ is taken, not the
exclusive one, which holds the other experts' directions too, with the opposite sign.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experts.bundle_delta import BaseDelta
from experts.bundle_expert import ExpertWeights
from experts.checkpoint import Checkpoint, FineTune
from experts.errors import RoutingError
from experts.factors import Delta, LowRank, added

RANK = 24
"""Directions kept of each group of matrices: what three adapters of rank 8 span together."""
GROUPS = (
    (("input_layernorm",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (("pre_feedforward_layernorm", "post_attention_layernorm"), ("mlp.gate_proj", "mlp.up_proj")),
)
"""Norm → the matrices of a decoder layer that read its output. Of several names the first that a layer has is the
one: where there is a norm before the MLP besides, the one named after attention is on attention's own output. The
second norm's input, the state after attention, is not among a router's features; the layer's input stands for it."""

_ONE_ADDED = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma"})
"""Model types whose norms multiply by one plus their weight."""

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
        torch.stack([_rows(task, shared, layer, norms, matrices, rank) for norms, matrices in GROUPS])
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


def of_expert(weights: ExpertWeights, base_delta: BaseDelta) -> Task:
    """δ of an expert as it is served, the fine-tune being gone: its exclusive part and the shared change."""

    def task(name: str) -> Delta | None:
        own = weights.factors.get(name)
        exact = weights.exact.get(name)
        return added(exact if own is None else own.low_rank(), base_delta.delta(name))

    return task


def readable(shared: Checkpoint, layers: Sequence[int]) -> bool:
    """Whether there are matrices that read the output of every one of these decoder layers."""
    return all(_reader(shared, layer, *group) is not None for layer in layers for group in GROUPS)


def _rows(
    task: Task, shared: Checkpoint, layer: int, norms: Sequence[str], matrices: Sequence[str], rank: int
) -> Tensor:
    """(rank, hidden) of one group."""
    found_at = _reader(shared, layer, norms, matrices)
    if found_at is None:
        raise RoutingError(
            f"the model has no decoder layer {layer + 1} with {' or '.join(norms)} and {', '.join(matrices)}; "
            "read a layer below the last of a Llama-like model, or use another kind of router"
        )
    prefix, norm = found_at
    weight = shared.tensor(f"{prefix}{norm}.weight").to(torch.float32)
    if shared.config.get("model_type") in _ONE_ADDED:
        weight = 1 + weight
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


def _reader(
    shared: Checkpoint, layer: int, norms: Sequence[str], matrices: Sequence[str]
) -> tuple[str, str] | None:
    """What stands before the parameters of the layer that reads the output of `layer`, and its norm's name.

    None where it has none of the norms or lacks a matrix.
    """
    for norm in norms:
        ending = f"layers.{layer}.{norm}.weight"
        for name in shared.names:
            prefix = name.removesuffix(f"{norm}.weight")
            if name.endswith(ending) and all(f"{prefix}{matrix}.weight" in shared for matrix in matrices):
                return prefix, norm
    return None
