"""A whole model for given gates: θ* + Σ g·v̂, streamed tensor by tensor into an ordinary Hugging Face folder."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experts.bundle_expert import ExpertWeights
from experts.checkpoint import Checkpoint, write_checkpoint

_ROOM = 64 << 20
"""For tokenizer, configs and headers."""


def write_model(
    shared: Checkpoint,
    gated: Sequence[tuple[ExpertWeights, float]],
    folder: Path,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write the merged model; each tensor is summed in float32 and rounded once to the shared expert's dtype.

    Args:
        shared: θ*, with tokenizer and chat template, which are copied.
        gated: experts and their gates; none gives the shared expert itself.
        folder: an existing empty folder.
        progress: called with each parameter's name once it is written; may raise to stop.

    Raises:
        CheckpointError: a sum that the dtype cannot hold; names the tensor.
    """
    write_checkpoint(shared, _deltas(shared, gated), folder, progress=progress)


def model_nbytes(shared: Checkpoint) -> int:
    """Bytes that `write_model` needs at most."""
    return shared.nbytes + _ROOM


def _deltas(
    shared: Checkpoint, gated: Sequence[tuple[ExpertWeights, float]]
) -> Iterator[tuple[str, Tensor | None]]:
    for name in shared.names:
        total: Tensor | None = None
        for expert, gate in gated:
            factors = expert.factors.get(name)
            part = expert.exact.get(name) if factors is None else factors.dense()
            if part is None:
                continue
            scaled = part.to(torch.float32) * gate
            total = scaled if total is None else total.add_(scaled)
        yield name, total
