"""Slot attention: the attention of a packed step over a KV cache of rows.

Registered with transformers as an attention implementation, so the model's own code calls it with
rotated queries and keys. It finds its cache through the attention module that calls it; there is no
global state. All decoding rows share one SDPA call; every prompt chunk has its own.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from service.engine.layout import PackLayout

IMPLEMENTATION = "twinserve_slots"
"""Name under which the function is registered; models without a mask function of that name build no mask."""

_KEY_BLOCK = 32
"""Decode attends to keys in multiples of this, so that shapes repeat from step to step."""


@dataclass(slots=True)
class AttentionStep:
    """Tensors of one step that every layer shares.

    Attributes:
        layout: where sequences lie in the pack.
        flat: (cached tokens,) index row · max_tokens + position of every cached token.
        span: decode attends to KV rows [0, rows) and positions [0, keys).
        order: (decode,) KV row of each decoding token, or None if they are exactly 0, 1, 2, ….
        masks: window (None = unlimited) → (rows, 1, 1, keys) boolean, True where allowed.
    """

    layout: PackLayout
    flat: Tensor
    span: tuple[int, int] = (0, 0)
    order: Tensor | None = None
    positions: Tensor | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """The decode mask for layers that see the last `window` positions, made once a step."""
        found = self.masks.get(window)
        if found is None:
            assert self.positions is not None
            keys = torch.arange(self.span[1], device=self.positions.device)
            found = keys <= self.positions[:, None]
            if window is not None:
                found &= keys > self.positions[:, None] - window
            found = found[:, None, None]
            self.masks[window] = found
        return found


class KvCache:
    """Keys and values of all rows and layers.

    Layer tensors have shape (rows, max_tokens, kv heads, head dim); they are made when the probing pass
    shows each layer's shape. Memory is touched only as rows fill.
    """

    def __init__(self, rows: int, max_tokens: int) -> None:
        self.rows = rows
        self.max_tokens = max_tokens
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.step: AttentionStep | None = None

    def begin(self, layout: PackLayout, device: torch.device) -> None:
        """Set up the coming forward pass."""
        flat = [
            r * self.max_tokens + p for r, p in zip(layout.decode_rows, layout.decode_positions, strict=True)
        ]
        for chunk in layout.chunks:
            first = chunk.row * self.max_tokens + chunk.start
            flat.extend(range(first, first + chunk.end - chunk.begin))
        step = AttentionStep(layout, torch.tensor(flat, dtype=torch.long, device=device))
        if layout.decode_rows:
            rows = layout.decode_rows[-1] + 1
            keys = -(-(max(layout.decode_positions) + 1) // _KEY_BLOCK) * _KEY_BLOCK
            step.span = (rows, min(keys, self.max_tokens))
            positions = [0] * rows
            for row, position in zip(layout.decode_rows, layout.decode_positions, strict=True):
                positions[row] = position
            step.positions = torch.tensor(positions, device=device)
            if rows != len(layout.decode_rows):
                step.order = torch.tensor(layout.decode_rows, device=device)
        self.step = step

    @torch.inference_mode()
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of one row to another, in all layers."""
        for keys, values in self.layers.values():
            keys[target, :tokens].copy_(keys[source, :tokens])
            values[target, :tokens].copy_(values[source, :tokens])

    @torch.inference_mode()
    def wipe(self, row: int, tokens: int) -> None:
        """Zero the first `tokens` positions of a row in all layers."""
        for keys, values in self.layers.values():
            keys[row, :tokens].zero_()
            values[row, :tokens].zero_()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """(1, heads, tokens, dim) queries and the step's new keys and values → (1, tokens, heads, dim)."""
        step = self.step
        assert step is not None, "attention outside of a step"
        layout = step.layout
        cached = layout.cached_tokens
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if cached:
            keys, values = self._layer(layer, key, value)
            keys.view(-1, *keys.shape[2:]).index_copy_(0, step.flat, key[0, :, :cached].transpose(0, 1))
            values.view(-1, *values.shape[2:]).index_copy_(0, step.flat, value[0, :, :cached].transpose(0, 1))
            decode = len(layout.decode_rows)
            if decode:
                out[:decode] = self._decode(step, query[0, :, :decode], keys, values, scale, window)
            for chunk in layout.chunks:
                end = chunk.start + chunk.end - chunk.begin
                out[chunk.begin : chunk.end] = _causal(
                    query[:, :, chunk.begin : chunk.end],
                    keys[chunk.row, :end].transpose(0, 1)[None],
                    values[chunk.row, :end].transpose(0, 1)[None],
                    chunk.start,
                    scale,
                    window,
                )
        for segment in layout.segments:
            part = slice(segment.begin, segment.end)
            out[part] = _causal(query[:, :, part], key[:, :, part], value[:, :, part], 0, scale, window)
        return out[None]

    def _layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            self.layers[layer] = (
                key.new_zeros(self.rows, self.max_tokens, key.shape[1], key.shape[3]),
                value.new_zeros(self.rows, self.max_tokens, value.shape[1], value.shape[3]),
            )
        return self.layers[layer]

    @staticmethod
    def _decode(
        step: AttentionStep,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """One query a row, query heads of one KV head packed as its queries: (decode, heads, dim)."""
        rows, length = step.span
        heads, count, dim = query.shape
        groups = keys.shape[2]
        each = query.transpose(0, 1).reshape(count, groups, heads // groups, dim)
        if step.order is not None:
            # Rows in between are empty or still in prefill: they compute garbage that nobody reads.
            spread = each.new_zeros(rows, *each.shape[1:])
            spread.index_copy_(0, step.order, each)
            each = spread
        found = F.scaled_dot_product_attention(
            each,
            keys[:rows, :length].transpose(1, 2),
            values[:rows, :length].transpose(1, 2),
            attn_mask=step.mask(window),
            scale=scale,
        )
        if step.order is not None:
            found = found.index_select(0, step.order)
        return found.reshape(count, heads, -1)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, start: int, scale: float | None, window: int | None
) -> Tensor:
    """Queries at positions start, start + 1, … over keys at 0, 1, …: (tokens, heads, dim)."""
    count, length = query.shape[2], key.shape[2]
    mask = None
    if start or (window is not None and length > window):
        position = torch.arange(start, start + count, device=query.device)[:, None]
        keys = torch.arange(length, device=query.device)
        mask = keys <= position
        if window is not None:
            mask &= keys > position - window
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return found[0].transpose(0, 1)


def attach(model: nn.Module, cache: KvCache) -> None:
    """Give every attention module of the model its cache."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal"):
            module.twinserve_cache = cache  # type: ignore[assignment]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, dim) → (1, tokens, heads, dim), no weights."""
    cache = module.twinserve_cache
    assert isinstance(cache, KvCache)
    layer = module.layer_idx
    assert isinstance(layer, int)
    return cache.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)
