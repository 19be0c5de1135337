"""The tensors of the paged KV cache, and where a step's tokens lie in them. Which block is whose: `scheduler`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.layout import PackLayout, Tables
from service.native.decoder import AttentionShape, Placement
from service.scheduler.blocks import BLOCK_TOKENS, KvGroup


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer: keys and values of the size (blocks, BLOCK_TOKENS, key heads, dim), and its KV group.

    The compiled decoder lays a block out in its own way: kernels.h.
    """

    keys: Tensor
    values: Tensor
    group: int


class KvCache:
    """Keys and values of all layers.

    Attributes:
        seen: layer → how it attends, learned in the probing pass.
        groups: the KV groups; empty until `allocate`.
        layers: layer → tensors; empty until `allocate`.
    """

    def __init__(self) -> None:
        self.seen: dict[int, AttentionShape] = {}
        self.groups: tuple[KvGroup, ...] = ()
        self.layers: dict[int, LayerCache] = {}

    def allocate(
        self, nbytes: int, longest: int, chunk: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the tensors, all together at most `nbytes`. Memory is touched only as blocks fill.

        A window helps where it is well below the longest sequence: then its layers form a group of their
        own, whose sequences keep only what the window and the chunk being written need.

        Args:
            longest: tokens of the longest sequence; one of them always fits.
            chunk: most prompt tokens of one sequence in a step.
        """
        windows = [self._kept(shape.window, longest, chunk) for shape in self.seen.values()]
        order = sorted(set(windows), key=lambda window: (window is not None, window or 0))
        blocks = [-(-(longest if window is None else window + chunk) // BLOCK_TOKENS) + 1 for window in order]
        group_of = dict(zip(self.seen, (order.index(window) for window in windows), strict=True))
        size = torch.empty((), dtype=dtype).element_size()
        per_block = [0] * len(order)
        for layer, shape in self.seen.items():
            per_block[group_of[layer]] += 2 * BLOCK_TOKENS * shape.key_heads * shape.dim * size
        one = sum(count * each for count, each in zip(blocks, per_block, strict=True))
        sequences = max(1.0, nbytes / one)
        self.groups = tuple(
            KvGroup(window, int(count * sequences) + 1) for window, count in zip(order, blocks, strict=True)
        )
        for layer, shape in self.seen.items():
            group = group_of[layer]
            dims = (self.groups[group].blocks, BLOCK_TOKENS, shape.key_heads, shape.dim)
            self.layers[layer] = LayerCache(
                torch.zeros(dims, dtype=dtype, device=device),
                torch.zeros(dims, dtype=dtype, device=device),
                group,
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers.values())

    @torch.inference_mode()
    def wipe(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Zero (group, block) pairs in all layers: their values may not be finite."""
        for group in {group for group, _ in blocks}:
            ids = [block for owner, block in blocks if owner == group]
            for layer in self.layers.values():
                if layer.group == group:
                    layer.keys[ids] = 0
                    layer.values[ids] = 0

    def place(self, layout: PackLayout, positions: Sequence[int]) -> Placement:
        """The integer tensors of one step, on the CPU."""
        groups = max(1, len(self.groups))
        count = len(layout.decode)
        places = np.empty((groups, layout.cached_tokens), np.int32)
        wanted = np.asarray(positions, np.int32)
        tables = _stack([entry.tables for entry in layout.decode], groups)
        chunk_tables = _stack([chunk.tables for chunk in layout.chunks], groups)
        if count:
            at = wanted[:count]
            blocks = tables[:, np.arange(count), at // BLOCK_TOKENS]
            places[:, :count] = blocks * BLOCK_TOKENS + at % BLOCK_TOKENS
        for index, chunk in enumerate(layout.chunks):
            at = wanted[chunk.begin : chunk.end]
            blocks = chunk_tables[:, index, at // BLOCK_TOKENS]
            places[:, chunk.begin : chunk.end] = blocks * BLOCK_TOKENS + at % BLOCK_TOKENS
        chunks = [(chunk.begin, chunk.end, chunk.start) for chunk in layout.chunks]
        segments = [(segment.begin, segment.end) for segment in layout.segments]
        return Placement(
            torch.from_numpy(wanted),
            torch.from_numpy(places),
            torch.from_numpy(tables),
            torch.from_numpy(np.asarray(chunks, np.int32).reshape(-1, 3)),
            torch.from_numpy(chunk_tables),
            torch.from_numpy(np.asarray(segments, np.int32).reshape(-1, 2)),
        )

    @staticmethod
    def _kept(window: int | None, longest: int, chunk: int) -> int | None:
        return None if window is None or window + chunk >= longest else window


def _stack(tables: Sequence[Tables], groups: int) -> "np.ndarray[tuple[int, int, int], np.dtype[np.int32]]":
    """(groups, sequences, width) block ids, the null block behind each table's end."""
    width = max((len(table) for each in tables for table in each), default=0)
    found = np.zeros((groups, len(tables), width), np.int32)
    for row, each in enumerate(tables):
        for group, table in enumerate(each):
            found[group, row, : len(table)] = table
    return found
