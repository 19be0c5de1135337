"""What the router of a classifier sees of a text: pooled hidden states of the shared encoder without gates.

`FeatureSpec` says which: states after its layers, taps first, each pooled in float32 over the text's own tokens,
padding left out ("last" is the closing special token). Unlike a decoder's, texts are cut on the right.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experts.errors import RoutingError
from experts.routing import FeatureSpec, pool


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, both (rows, longest) int64, padded on the right."""
    longest = max(len(ids) for ids in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def read_features(outputs: Any, lengths: Sequence[int], spec: FeatureSpec) -> Tensor:
    """(rows, d) float32 on the CPU, from an encoder's output with hidden states of right-padded texts."""
    states = [
        outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
        for layer in (*spec.taps, spec.layer)
    ]
    return torch.stack(
        [
            torch.cat([pool(state[row, :length], spec.pooling) for state in states]).cpu()
            for row, length in enumerate(lengths)
        ]
    )


def check_spec(spec: FeatureSpec, layers: int) -> None:
    """Raise unless the encoder has every layer of the spec."""
    if max((*spec.taps, spec.layer)) > layers:
        raise RoutingError(
            f"feature layers {(*spec.taps, spec.layer)} do not exist; the encoder has {layers}"
        )


@torch.inference_mode()
def encoder_features(
    encoder: Any, texts: Sequence[Sequence[int]], pad_id: int, spec: FeatureSpec, batch: int = 32
) -> Tensor:
    """Features of tokenised texts, (n, d) float32, in the order given.

    Raises:
        RoutingError: no text, one without tokens, a layer that does not exist, or NaN or Inf.
    """
    if not texts or not all(texts):
        raise RoutingError("a text without tokens has no features; give at least one text, and none empty")
    check_spec(spec, int(encoder.config.num_hidden_layers))
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: list[Tensor] = []
    for start in range(0, len(order), batch):
        part = [texts[index] for index in order[start : start + batch]]
        ids, mask = pad(part, pad_id)
        outputs = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        rows.append(read_features(outputs, [len(ids) for ids in part], spec))
    stacked = torch.cat(rows)
    features = torch.empty_like(stacked)
    features[torch.tensor(order)] = stacked
    if not bool(torch.isfinite(features).all()):
        raise RoutingError("the shared encoder gives NaN or Inf features; check the fine-tunes and the merge")
    return features
