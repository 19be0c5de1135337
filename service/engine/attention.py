"""Attention of a packed step over the paged KV cache, for the unmodified HF model.

Registered with transformers as an attention implementation, so the model's own code calls it with
rotated queries and keys. It finds its cache through the attention module that calls it; there is no
global state. All decoding sequences share one SDPA call; every prompt chunk has its own.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from service.engine.cache import KvCache, LayerCache
from service.engine.layout import PackLayout
from service.native.decoder import AttentionShape, Placement
from service.scheduler.blocks import BLOCK_TOKENS

IMPLEMENTATION = "twinserve_paged"
"""Name under which the function is registered; models without a mask function of that name build no mask."""


@dataclass(slots=True)
class AttentionStep:
    """Tensors of one step that every layer shares, on the model's device.

    Attributes:
        layout: where sequences lie in the pack.
        places: (KV groups, cached tokens) index of every cached token in the flattened cache.
        tables: (KV groups, decoding sequences, width) block ids.
        chunk_tables: (KV groups, chunks, width) block ids.
        positions: (tokens,).
        fresh: for every KV group, (blocks,) ids of those whose first token the step writes.
        masks: window (None = unlimited) → (sequences, 1, 1, keys) boolean, True where allowed.
    """

    layout: PackLayout
    places: Tensor
    tables: Tensor
    chunk_tables: Tensor
    positions: Tensor
    fresh: list[Tensor]
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """The decode mask for layers that see the last `window` positions, made once a step."""
        found = self.masks.get(window)
        if found is None:
            last = self.positions[: len(self.layout.decode), None]
            keys = torch.arange(self.tables.shape[2] * BLOCK_TOKENS, device=last.device)
            found = keys <= last
            if window is not None:
                found &= keys > last - window
            found = found[:, None, None]
            self.masks[window] = found
        return found


class PagedAttention:
    """What one model's attention modules call.

    Attributes:
        step: set up by `begin` before every forward pass.
    """

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self.step: AttentionStep | None = None

    def begin(self, layout: PackLayout, placement: Placement, device: torch.device) -> None:
        """Set up the coming forward pass."""
        places = placement.places.to(device, torch.long)
        self.step = AttentionStep(
            layout,
            places,
            placement.tables.to(device, torch.long),
            placement.chunk_tables.to(device, torch.long),
            placement.positions.to(device, torch.long),
            [row[row % BLOCK_TOKENS == 0] // BLOCK_TOKENS for row in places],
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """(1, heads, tokens, dim) queries and the step's new keys and values → (1, tokens, heads, dim)."""
        step = self.step
        assert step is not None, "attention outside of a step"
        layout = step.layout
        self._note(layer, query, key, value, scale, window)
        cached = layout.cached_tokens
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if cached:
            own = self.cache.layers[layer]
            for target, source in ((own.keys, key), (own.values, value)):
                # A block's last owner may have left NaN, which a mask does not keep out of a weighted sum.
                target.index_fill_(0, step.fresh[own.group], 0)
                flat = target.view(-1, *target.shape[2:])
                flat.index_copy_(0, step.places[own.group], source[0, :, :cached].transpose(0, 1))
            decode = len(layout.decode)
            if decode:
                out[:decode] = _decode(step, own, query[0, :, :decode], scale, window)
            for index, chunk in enumerate(layout.chunks):
                length = chunk.start + chunk.end - chunk.begin
                table = step.chunk_tables[own.group, index]
                out[chunk.begin : chunk.end] = _causal(
                    query[:, :, chunk.begin : chunk.end],
                    own.keys[table].flatten(0, 1)[:length].transpose(0, 1)[None],
                    own.values[table].flatten(0, 1)[:length].transpose(0, 1)[None],
                    chunk.start,
                    scale,
                    window,
                )
        for segment in layout.segments:
            part = slice(segment.begin, segment.end)
            out[part] = _causal(query[:, :, part], key[:, :, part], value[:, :, part], 0, scale, window)
        return out[None]

    def _note(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> None:
        if layer not in self.cache.seen:
            dim = query.shape[-1]
            assert key.shape == value.shape, "keys and values of one layer differ in shape"
            self.cache.seen[layer] = AttentionShape(
                query.shape[1], key.shape[1], dim, scale if scale is not None else dim**-0.5, window
            )


def _decode(
    step: AttentionStep, own: LayerCache, query: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """One query a sequence, query heads of one key head packed as its queries: (decode, heads, dim)."""
    heads, count, dim = query.shape
    tables = step.tables[own.group]
    groups = own.keys.shape[2]
    found = F.scaled_dot_product_attention(
        query.transpose(0, 1).reshape(count, groups, heads // groups, dim),
        own.keys[tables].flatten(1, 2).transpose(1, 2),
        own.values[tables].flatten(1, 2).transpose(1, 2),
        attn_mask=step.mask(window),
        scale=scale,
    )
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


def attach(model: nn.Module, attention: PagedAttention) -> None:
    """Give every attention module of the model its cache."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal"):
            module.twinserve_attention = attention  # type: ignore[assignment]


def paged_attention(
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
    attention = module.twinserve_attention
    assert isinstance(attention, PagedAttention)
    layer = module.layer_idx
    assert isinstance(layer, int)
    return attention.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)
