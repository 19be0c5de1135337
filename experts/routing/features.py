"""What a router sees of a prompt: pooled hidden states of the shared expert, and nothing else.

The definition is exact, because two programs compute it: `extract_features` here when a router is trained,
and the engine's packed step when a request is routed. For one prompt of token ids p:

1. ids = the last ``max_tokens`` of p, at positions 0..len(ids)-1;
2. H = hidden states (len(ids), hidden) of the *shared* expert without any gate: after the final norm for
   ``layer == -1``, else the output of decoder layer ``layer`` (counted from 1, before any final norm);
3. H is converted to float32 and pooled over all its tokens by `pool`.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from experts.errors import RoutingError

Pooling = Literal["mean", "last", "mean_last"]


class _Reached(Exception):  # noqa: N818 - ends a pass early, nothing is wrong
    """The layer whose output is wanted is done; the layers above it need not run."""


class FeatureSpec(BaseModel):
    """Which hidden state, which tokens, which pooling.

    Attributes:
        layer: -1 is the state after the final norm; k >= 1 the output of decoder layer k.
        pooling: mean over the tokens, the last token, or both concatenated (mean first).
        max_tokens: only that many last tokens of a prompt are read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = -1
    pooling: Pooling = "mean_last"
    max_tokens: int = Field(default=512, ge=1)

    @field_validator("layer")
    @classmethod
    def _layer_counts_from_one(cls, layer: int) -> int:
        if layer != -1 and layer < 1:
            raise ValueError(
                f"layer {layer}: use -1 (after the final norm) or a decoder layer counted from 1"
            )
        return layer

    def cut(self, ids: Sequence[int]) -> Sequence[int]:
        """The last `max_tokens` ids."""
        return ids[-self.max_tokens :]

    def size(self, hidden: int) -> int:
        """Length of a feature vector for a model of that hidden size."""
        return 2 * hidden if self.pooling == "mean_last" else hidden


def pool(hidden: Tensor, pooling: Pooling) -> Tensor:
    """Pool one prompt's hidden states (tokens, hidden) into float32 (d,), d as `FeatureSpec.size` says."""
    states = hidden.to(torch.float32)
    if pooling == "mean":
        return states.mean(0)
    if pooling == "last":
        return states[-1]
    return torch.cat([states.mean(0), states[-1]])


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of an HF causal language model.

    Raises:
        RoutingError: the model has no such list.
    """
    base = getattr(model, "base_model", model)
    count = getattr(model.config, "num_hidden_layers", None)
    for child in base.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise RoutingError(f"{type(model).__name__} has no list of {count} decoder layers; use layer=-1")


def extract_features(
    model: nn.Module,
    prompts_ids: Sequence[Sequence[int]],
    spec: FeatureSpec,
    *,
    batch_tokens: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Features of prompts, (n, d) float32 on the CPU, in the order given.

    Prompts of like length share a batch, padded on the right: attention is causal, so no real token ever sees
    padding and no mask is needed. `batch_tokens` bounds one batch, padding included; `progress` gets (prompts
    done, prompts).

    Raises:
        RoutingError: a prompt is empty, the layer does not exist, or the model gives NaN or Inf.
    """
    cut = [list(spec.cut(ids)) for ids in prompts_ids]
    for index, ids in enumerate(cut):
        if not ids:
            raise RoutingError(f"prompt {index} has no tokens; give at least one token id")
    features: list[Tensor | None] = [None] * len(cut)
    done = 0
    for batch in _batches([len(ids) for ids in cut], batch_tokens):
        width = len(cut[batch[-1]])
        padded = torch.zeros(len(batch), width, dtype=torch.long)
        for row, index in enumerate(batch):
            padded[row, : len(cut[index])] = torch.tensor(cut[index])
        states = _hidden_states(model, padded, spec.layer)
        for row, index in enumerate(batch):
            features[index] = pool(states[row, : len(cut[index])], spec.pooling).cpu()
        done += len(batch)
        if progress is not None:
            progress(done, len(cut))
    kept = [feature for feature in features if feature is not None]
    if not kept:
        raise RoutingError("no prompts to take features of; give at least one")
    stacked = torch.stack(kept)
    if not bool(torch.isfinite(stacked).all()):
        row = int((~torch.isfinite(stacked)).any(1).nonzero()[0])
        raise RoutingError(f"the shared expert gives NaN or Inf features for prompt {row}; check its weights")
    return stacked


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in ascending length, cut so that rows × longest stays within the budget (one row at least)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def _hidden_states(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """(batch, tokens, hidden) of one padded batch, on the model's device; runs no layer above `layer`."""
    base = getattr(model, "base_model", model)
    ids = ids.to(next(model.parameters()).device)
    if layer == -1:
        states: Tensor = base(input_ids=ids, use_cache=False).last_hidden_state
        return states
    layers = decoder_layers(model)
    if layer > len(layers):
        raise RoutingError(
            f"feature layer {layer} does not exist; the model has {len(layers)} decoder layers"
        )
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    handle = layers[layer - 1].register_forward_hook(keep)
    try:
        with contextlib.suppress(_Reached):
            base(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
