"""One decoder layer in plain torch, token by token where tokens differ: what the kernels must compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "after_attention", "before_mlp", "after_mlp", "query", "key")


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    groups: int = 2
    dim: int = 8
    rotary: int = 8
    hidden: int = 24
    width: int = 40
    window: int = 0
    activation: int = 0
    biases: bool = False
    norms: tuple[str, ...] = ("input", "before_mlp")

    def sizes(self, name: str) -> tuple[int, int]:
        """(out, in) of a matrix."""
        queries, keys = self.heads * self.dim, self.groups * self.dim
        return {
            "q": (queries, self.hidden), "k": (keys, self.hidden), "v": (keys, self.hidden),
            "o": (self.hidden, queries), "gate": (self.width, self.hidden), "up": (self.width, self.hidden),
            "down": (self.hidden, self.width),
        }[name]  # fmt: skip

    def norm_size(self, name: str) -> int:
        return self.dim if name in ("query", "key") else self.hidden


@dataclass
class Expert:
    """Matrix → (a (rank, in), b (rank, out)), matrix → bias, norm → difference; parts may be missing."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Layer:
    shape: Shape
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    scales: dict[str, Tensor]
    cosine: Tensor
    sine: Tensor
    epsilon: float = 1e-5
    scale: float = 0.3

    def double(self) -> "Layer":
        """The same in float64."""
        parts = {
            name: {key: tensor.double() for key, tensor in getattr(self, name).items()}
            for name in ("weights", "biases", "scales")
        }
        return replace(self, **parts, cosine=self.cosine.double(), sine=self.sine.double())

    def run(self, hidden: Tensor, experts: Sequence[Expert], gates: Sequence[Mapping[int, float]]) -> Tensor:
        """One whole sequence (tokens, hidden), float32 or as `double`, with each token's own gates → its like."""
        shape, tokens = self.shape, hidden.shape[0]
        normed = self._norm("input", hidden, experts, gates)
        query, key, value = (self._linear(name, normed, experts, gates) for name in ("q", "k", "v"))
        query = self._rotated("query", query.view(tokens, shape.heads, shape.dim), experts, gates)
        key = self._rotated("key", key.view(tokens, shape.groups, shape.dim), experts, gates)
        value = value.view(tokens, shape.groups, shape.dim)
        each = shape.heads // shape.groups
        key, value = (x.repeat_interleave(each, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
        places = torch.arange(tokens)
        seen = places[None] <= places[:, None]
        if shape.window:
            seen &= places[None] > places[:, None] - shape.window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, value).reshape(tokens, -1)
        out = self._linear("o", attended, experts, gates)
        hidden = hidden + self._norm("after_attention", out, experts, gates)
        normed = self._norm("before_mlp", hidden, experts, gates)
        gate, up = (self._linear(name, normed, experts, gates) for name in ("gate", "up"))
        active = F.gelu(gate, approximate="tanh") if shape.activation else F.silu(gate)
        down = self._linear("down", active * up, experts, gates)
        return hidden + self._norm("after_mlp", down, experts, gates)

    def _linear(self, name: str, x: Tensor, experts: Sequence[Expert], gates) -> Tensor:
        y = F.linear(x, self.weights[name], self.biases.get(name))
        for token, mix in enumerate(gates):
            for index, gate in mix.items():
                if name in experts[index].factors:
                    a, b = experts[index].factors[name]
                    y[token] += gate * ((x[token] @ a.to(x.dtype).t()) @ b.to(x.dtype))
                if name in experts[index].biases:
                    y[token] += gate * experts[index].biases[name]
        return y

    def _norm(self, name: str, x: Tensor, experts: Sequence[Expert], gates) -> Tensor:
        if name not in self.scales:
            return x
        scale = self.scales[name].expand(x.shape[0], -1).clone()
        for token, mix in enumerate(gates):
            for index, gate in mix.items():
                if name in experts[index].norms:
                    scale[token] += gate * experts[index].norms[name]
        scale = scale if x.dim() == 2 else scale[:, None]
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * scale

    def _rotated(self, name: str, x: Tensor, experts: Sequence[Expert], gates) -> Tensor:
        x = self._norm(name, x, experts, gates)
        turned, kept = x[..., : self.shape.rotary], x[..., self.shape.rotary :]
        first, second = turned.chunk(2, dim=-1)
        cosine, sine = (table[: x.shape[0], None] for table in (self.cosine, self.sine))
        return torch.cat([turned * cosine + torch.cat([-second, first], -1) * sine, kept], -1)


def random_layer(shape: Shape, seed: int, positions: int = 256, dtype: torch.dtype = torch.float32) -> Layer:
    """Weights exact in `dtype`, held in float32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int, strength: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * strength).to(dtype).float()

    half = shape.rotary // 2
    angles = torch.arange(positions)[:, None] / 50.0 ** (torch.arange(half) / half)
    angles = torch.cat([angles, angles], dim=1)
    return Layer(
        shape,
        {name: random(*shape.sizes(name), strength=shape.sizes(name)[1] ** -0.5) for name in MATRICES},
        {name: random(shape.sizes(name)[0], strength=0.3) for name in MATRICES} if shape.biases else {},
        {name: 1.0 + 0.2 * torch.randn(shape.norm_size(name), generator=generator) for name in shape.norms},
        angles.cos().contiguous(),
        angles.sin().contiguous(),
    )


def random_expert(
    shape: Shape, seed: int, rank: int, dtype: torch.dtype = torch.float32, *, exact: bool
) -> Expert:
    """Low-rank parts on every matrix, of rank 0 on some; with `exact` also biases and norms."""
    generator = torch.Generator().manual_seed(1000 + seed)
    expert = Expert()
    for index, name in enumerate(MATRICES):
        out, inside = shape.sizes(name)
        if rank and (seed + index) % 4:
            a = torch.randn(rank, inside, generator=generator) * inside**-0.5
            expert.factors[name] = (
                a.to(dtype),
                (torch.randn(rank, out, generator=generator) * 0.5).to(dtype),
            )
        if exact and index % 2:
            expert.biases[name] = torch.randn(out, generator=generator) * 0.2
    if exact:
        for name in shape.norms[seed % 2 :]:
            expert.norms[name] = torch.randn(shape.norm_size(name), generator=generator) * 0.2
    return expert
