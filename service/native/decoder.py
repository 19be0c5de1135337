"""The compiled decoder layers of one model: weights, experts, cache, and one call for a run of layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.native import build, prepack
from service.native.parts import MATRICES, NORMS, DecoderParts, LayerParts, UnrecognisedError
from service.native.quantise import panels, quantise

_PRODUCTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Matrices that read the same input stand side by side in one product."""

_COLUMNS = 64
"""Output columns of a tile: kernels.h, kColumns."""

SHARED_BASE = 0
"""Id of the shared expert's own weights; merged ones have others."""

WeightOf = Callable[[str], Tensor]
"""Parameter name → an (out, in) weight."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """How one layer attends, as the model itself says it in a pass.

    Attributes:
        group: index of the KV group that holds the layer's cache.
        window: positions that a query sees; None is all.
    """

    heads: int
    key_heads: int
    dim: int
    scale: float
    window: int | None
    group: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the tokens of one step lie; int32, contiguous.

    Attributes:
        positions: (tokens,).
        places: (KV groups, cached tokens) block · BLOCK_TOKENS + offset.
        tables: (KV groups, decoding sequences, width) block ids.
        chunks: (chunks, 3) first token, end token, position of the first.
        chunk_tables: (KV groups, chunks, width) block ids.
        segments: (segments, 2) first token, end token.
    """

    positions: Tensor
    places: Tensor
    tables: Tensor
    chunks: Tensor
    chunk_tables: Tensor
    segments: Tensor


class NativeDecoder:
    """Owns the compiled object. Used by one thread at a time.

    Args:
        attention: one for each layer.
        pack: reorder base weights for the processor.
        cache: folder of compiled libraries; None is the user's own.

    Attributes:
        packed: the base products use copies of the weights.

    Raises:
        NativeUnavailableError: the library cannot be had.
        UnrecognisedError: layers differ in shape, or matrices do not fit the heads.
    """

    def __init__(
        self,
        parts: DecoderParts,
        attention: Sequence[AttentionShape],
        *,
        pack: bool,
        cache: Path | None = None,
    ) -> None:
        _check_shapes(parts, attention)
        build.load(cache or build.default_cache())
        self.parts = parts
        self.packed = pack
        first = attention[0]
        layer = parts.layers[0]
        self._object: Any = torch.classes.twinserve.Decoder(
            first.heads,
            first.key_heads,
            first.dim,
            parts.ropes[0][0].shape[1],
            layer.matrices["q"][1].in_features,
            layer.matrices["gate"][1].out_features,
            parts.activation,
        )
        for cosine, sine in parts.ropes:
            self._object.add_rope(cosine, sine)
        for part, shape in zip(parts.layers, attention, strict=True):
            scales = [part.scales[name][1] if name in part.scales else None for name in NORMS]
            self._object.add_layer(
                scales, part.epsilon, shape.scale, shape.group, shape.window or 0, part.rope
            )
        own = parts.modules
        self.install(SHARED_BASE, self.prepare(lambda name: own[name].weight))

    def quantise(self) -> None:
        """Keep the shared expert's own matrices as int8 with a scale a row from now on; merged weights stay as made.

        Raises:
            UnrecognisedError: a weight is not finite.
        """
        own = self.parts.modules
        self.install(SHARED_BASE, self.prepare(lambda name: own[name].weight, int8=True))

    def prepare(self, weight_of: WeightOf, *, int8: bool = False) -> "PreparedBase":
        """The tensors of a weight set, on any thread.

        Raises:
            UnrecognisedError: a weight that is not finite cannot become int8.
        """
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        scales: list[Tensor | None] = []
        nbytes = 0
        for layer in self.parts.layers:
            for names in _PRODUCTS:
                whole = torch.cat([weight_of(f"{layer.matrices[name][0]}.weight") for name in names])
                bias = _bias(layer, names)
                if int8:
                    steps, scale = quantise(whole)
                    nbytes += steps.nbytes + scale.nbytes
                    weights.append(panels(steps))
                    scales.append(scale)
                    biases.append(_wide(bias))
                    continue
                nbytes += whole.nbytes
                weights.append(self.arranged(whole))
                scales.append(None)
                biases.append(bias)
        return PreparedBase(weights, biases, scales, nbytes)

    def arranged(self, weight: Tensor) -> Tensor:
        """An (out, in) weight as the products want it."""
        return prepack.reorder(weight) if self.packed else weight

    def install(self, base: int, prepared: "PreparedBase") -> int:
        """Between two steps: hand a prepared weight set over; returns its bytes."""
        self._object.set_base(base, prepared.weights, prepared.biases, prepared.scales, self.packed)
        return prepared.nbytes

    def drop_base(self, base: int) -> None:
        """Give a weight set's memory back."""
        self._object.drop_base(base)

    def set_cache(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Of every layer, in the size (blocks, BLOCK_TOKENS, key heads, dim); kernels.h says how a block lies."""
        self._object.set_cache(list(keys), list(values))

    def set_expert(
        self, slot: int, matrices: Mapping[str, tuple[Tensor, Tensor]], vectors: Mapping[str, Tensor]
    ) -> None:
        """Put an expert into a slot; its factors are shared, not copied.

        Args:
            matrices: parameter name → a (rank, in), and b (rank, out) as `tiled` makes it, in the model's dtype.
            vectors: name of a bias or norm weight → its difference.
        """
        tensors: list[Tensor | None] = []
        for layer in self.parts.layers:
            for name in MATRICES:
                path = layer.matrices[name][0]
                a, b = matrices.get(f"{path}.weight", (None, None))
                tensors += [a, b, _wide(vectors.get(f"{path}.bias"))]
            for name in NORMS:
                own = layer.scales.get(name)
                tensors.append(None if own is None else _wide(vectors.get(f"{own[0]}.weight")))
        self._object.set_expert(slot, tensors)

    def drop_expert(self, slot: int) -> None:
        """Empty a slot."""
        self._object.drop_expert(slot)

    def begin(self, placement: Placement) -> None:
        """Set up the coming step, without gates."""
        self._object.begin(
            placement.positions,
            placement.places,
            placement.tables,
            placement.chunks,
            placement.chunk_tables,
            placement.segments,
        )

    def mix(self, uses: Sequence[tuple[int, int, int]], gates: Sequence[float]) -> None:
        """Set the gates of the layers to come, until the next call.

        Args:
            uses: slot, first token, end token; ranges of one slot do not overlap.
            gates: one for each use.
        """
        self._object.mix(
            torch.tensor(uses, dtype=torch.int32).view(-1, 3), torch.tensor(gates, dtype=torch.float32)
        )

    def run(self, hidden: Tensor, first: int, last: int, base: int = SHARED_BASE) -> Tensor:
        """Layers [first, last) over (tokens, hidden), in place."""
        found: Tensor = self._object.run(hidden, first, last, base)
        return found

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the parameters whose exclusive vectors this computes."""
        names: set[str] = set()
        for layer in self.parts.layers:
            for path, module in layer.matrices.values():
                names.add(f"{path}.weight")
                if module.bias is not None:
                    names.add(f"{path}.bias")
            names.update(f"{path}.weight" for path, _ in layer.scales.values())
        return frozenset(names)


def tiled(b: Tensor) -> Tensor:
    """(rank, out) → (tiles, rank, _COLUMNS), so that what one tile of the output needs lies in one piece."""
    rank, out = b.shape
    padded = torch.nn.functional.pad(b, (0, -out % _COLUMNS))
    return padded.view(rank, -1, _COLUMNS).transpose(0, 1).contiguous()


def untiled(tiles: Tensor, out: int) -> Tensor:
    """The (rank, out) that `tiled` was given."""
    return tiles.transpose(0, 1).reshape(tiles.shape[1], -1)[:, :out]


@dataclass(frozen=True, slots=True)
class PreparedBase:
    """One set of base weights in the processor's layout.

    Attributes:
        scales: of weights that are int8, with float32 biases; None for the others.
        nbytes: of the weights, without padding that the layout may add.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    scales: list[Tensor | None]
    nbytes: int


def _check_shapes(parts: DecoderParts, attention: Sequence[AttentionShape]) -> None:
    """The kernels read plain memory by one set of sizes: every layer must have exactly those."""
    first = attention[0]
    width = parts.layers[0].matrices["gate"][1].out_features
    hidden = parts.layers[0].matrices["q"][1].in_features
    queries, keys = first.heads * first.dim, first.key_heads * first.dim
    wanted = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    for layer, shape in zip(parts.layers, attention, strict=True):
        if (shape.heads, shape.key_heads, shape.dim) != (first.heads, first.key_heads, first.dim):
            raise UnrecognisedError(f"the heads of {layer.path} differ from the first layer's")
        for name, (path, module) in layer.matrices.items():
            if (module.out_features, module.in_features) != wanted[name]:
                raise UnrecognisedError(
                    f"{path} is {module.out_features} x {module.in_features}, not {wanted[name]} "
                    "as heads and first layer say"
                )
    rotary = {table.shape[1] for rope in parts.ropes for table in rope}
    if len(rotary) != 1 or not max(rotary) <= first.dim:
        raise UnrecognisedError(f"rotations of {sorted(rotary)} dimensions in heads of {first.dim}")


def _bias(layer: LayerParts, names: Sequence[str]) -> Tensor | None:
    modules = [layer.matrices[name][1] for name in names]
    if all(module.bias is None for module in modules):
        return None
    return torch.cat(
        [
            module.weight.new_zeros(module.out_features) if module.bias is None else module.bias.detach()
            for module in modules
        ]
    )


def _wide(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.float32).contiguous()
