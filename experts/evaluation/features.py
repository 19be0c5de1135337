"""Router features of many prompts that begin alike: the common prefix runs once.

Gives what `experts.routing.extract_features` gives, up to rounding, in a fraction of the time.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experts.routing import FeatureSpec, decoder_layers, extract_features

_ROWS = 128


class _Done(Exception):  # noqa: N818 - ends a pass early, nothing is wrong
    """The last wanted layer is computed."""


@torch.inference_mode()
def prefixed_features(
    model: nn.Module, prompts: Sequence[Sequence[int]], prefix: Sequence[int], spec: FeatureSpec
) -> Tensor:
    """Features of prompts, (n, d) float32, in the order given.

    Falls back to `extract_features` where a prompt does not begin with the prefix or is longer than the spec reads.
    """
    length = len(prefix)
    fits = all(length < len(p) <= spec.max_tokens and list(p[:length]) == list(prefix) for p in prompts)
    if not prefix or not fits:
        return extract_features(model, prompts, spec)
    head, cache = _states(model, torch.tensor([list(prefix)]), spec, None)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        width = len(prompts[rows[-1]]) - length
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for row, i in enumerate(rows):
            ids[row, : len(prompts[i]) - length] = torch.tensor(list(prompts[i][length:]))
        states, _ = _states(model, ids, spec, cache)
        for row, i in enumerate(rows):
            own = len(prompts[i]) - length
            parts = [
                _pooled(before[0], after[row, :own], spec) for before, after in zip(head, states, strict=True)
            ]
            found[i] = torch.cat(parts)
    return torch.stack(found)


def _pooled(before: Tensor, after: Tensor, spec: FeatureSpec) -> Tensor:
    """`experts.routing.pool` of (prefix, hidden) and (suffix, hidden) in one."""
    last = after[-1].float()
    if spec.pooling == "last":
        return last
    mean = (before.float().sum(0) + after.float().sum(0)) / (len(before) + len(after))
    return mean if spec.pooling == "mean" else torch.cat([mean, last])


def _states(model: nn.Module, ids: Tensor, spec: FeatureSpec, prefix: Any) -> tuple[list[Tensor], Any]:
    """Hidden states (rows, tokens, hidden) of the taps and the layer behind a cached prefix, and the cache."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if prefix is not None:
        for index, layer in enumerate(prefix.layers):
            if layer.is_initialized:
                rows = ids.shape[0]
                cache.update(
                    layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index
                )
    seen: list[Tensor] = []
    base = getattr(model, "base_model", model)
    wanted = spec.taps if spec.layer == -1 else (*spec.taps, spec.layer)

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        if spec.layer != -1 and len(seen) == len(wanted):
            raise _Done

    layers = decoder_layers(model) if wanted else nn.ModuleList()
    hooks = [layers[layer - 1].register_forward_hook(keep) for layer in wanted]
    try:
        with contextlib.suppress(_Done):
            seen.append(base(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, cache
