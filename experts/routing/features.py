"""What a router sees of a prompt: pooled hidden states of the shared expert, and nothing else.

The definition is exact, because two programs compute it: `extract_features` here when a router is trained,
and the engine's packed step when a request is routed. For one prompt of token ids p:

1. ids = the last ``max_tokens`` of p, at positions 0..len(ids)-1;
2. H = hidden states (len(ids), hidden) of the *shared* expert without any gate: after the final norm for
   ``layer == -1``, else the output of decoder layer ``layer`` (counted from 1, before any final norm);
3. H is converted to float32 and pooled over all its tokens by `pool`;
4. the outputs of the decoder layers in ``taps`` are pooled likewise and stand in front of it, lowest first.
"""

import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
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
        taps: decoder layers below `layer`, ascending, whose pooled outputs stand in front. Not written where
            empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = -1
    pooling: Pooling = "mean_last"
    max_tokens: int = Field(default=512, ge=1)
    taps: tuple[int, ...] = Field(default=(), exclude_if=lambda taps: not taps)

    @field_validator("layer")
    @classmethod
    def _layer_counts_from_one(cls, layer: int) -> int:
        if layer != -1 and layer < 1:
            raise ValueError(
                f"layer {layer}: use -1 (after the final norm) or a decoder layer counted from 1"
            )
        return layer

    @model_validator(mode="after")
    def _taps_ascend_below_the_layer(self) -> Self:
        ends = (0, *self.taps) if self.layer == -1 else (0, *self.taps, self.layer)
        if any(low >= high for low, high in pairwise(ends)):
            raise ValueError(
                f"taps {list(self.taps)}: name decoder layers from 1 on, ascending, each below layer {self.layer}"
            )
        return self

    @property
    def read(self) -> tuple[int, ...]:
        """Every layer of a feature vector, in order; -1 last where it is read."""
        return (*self.taps, self.layer)

    @property
    def parts(self) -> int:
        """How many pooled states a feature vector is made of."""
        return len(self.taps) + 1

    def cut(self, ids: Sequence[int]) -> Sequence[int]:
        """The last `max_tokens` ids."""
        return ids[-self.max_tokens :]

    def size(self, hidden: int) -> int:
        """Length of a feature vector for a model of that hidden size, taps included."""
        return self.parts * (2 * hidden if self.pooling == "mean_last" else hidden)


def pool(hidden: Tensor, pooling: Pooling) -> Tensor:
    """Pool one prompt's states (tokens, hidden) of one layer into float32 (2 · hidden,) or, but for "mean_last",
    (hidden,).
    """
    states = hidden.to(torch.float32)
    if pooling == "mean":
        return states.mean(0)
    if pooling == "last":
        return states[-1]
    return torch.cat([states.mean(0), states[-1]])


def narrowed(features: Tensor, spec: FeatureSpec, part: FeatureSpec) -> Tensor:
    """Of features (n, d) by `spec`, those that `part` describes: layers that both read, (n, d').

    Raises:
        RoutingError: `part` reads or pools what `spec` does not, or the width does not divide.
    """
    alike = (part.pooling, part.max_tokens) == (spec.pooling, spec.max_tokens)
    if not alike or not set(part.read) <= set(spec.read):
        raise RoutingError(
            f"features of {spec.model_dump()} do not hold those of {part.model_dump()}; read layers of the same "
            "spec, pooled alike"
        )
    if features.dim() != 2 or features.shape[1] % spec.parts:
        raise RoutingError(
            f"features have shape {tuple(features.shape)}; {spec.parts} layers stand in (n, d), equally wide"
        )
    if part.read == spec.read:
        return features
    pieces = features.chunk(spec.parts, dim=1)
    return torch.cat([pieces[spec.read.index(layer)] for layer in part.read], dim=1)


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

    One pass gives every layer of the spec. Prompts of like length share a batch, padded on the right: attention
    is causal, so no real token ever sees padding and no mask is needed. `batch_tokens` bounds one batch, padding
    included; `progress` gets (prompts done, prompts).

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
        states = _hidden_states(model, padded, spec)
        for row, index in enumerate(batch):
            pooled = [pool(layer[row, : len(cut[index])], spec.pooling) for layer in states]
            features[index] = torch.cat(pooled).cpu()
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
def _hidden_states(model: nn.Module, ids: Tensor, spec: FeatureSpec) -> list[Tensor]:
    """(batch, tokens, hidden) for every tap and the layer, on the model's device; runs no layer above the last."""
    base = getattr(model, "base_model", model)
    ids = ids.to(next(model.parameters()).device)
    read = spec.taps if spec.layer == -1 else (*spec.taps, spec.layer)
    layers = decoder_layers(model) if read else nn.ModuleList()
    if read and read[-1] > len(layers):
        raise RoutingError(
            f"feature layer {read[-1]} does not exist; the model has {len(layers)} decoder layers"
        )
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        if len(seen) == len(read) and spec.layer != -1:
            raise _Reached

    handles = [layers[layer - 1].register_forward_hook(keep) for layer in read]
    try:
        with contextlib.suppress(_Reached):
            seen.append(base(input_ids=ids, use_cache=False).last_hidden_state)
    finally:
        for handle in handles:
            handle.remove()
    return seen
