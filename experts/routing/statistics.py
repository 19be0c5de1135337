"""Class means and one shared covariance as few numbers: what prototypes, guards and joining experts need.

Features are scaled by the spread inside the classes, then their pooled covariance is kept as its largest
principal directions and one variance for all the others (probabilistic PCA, Tipping & Bishop 1999), shrunk
towards the identity by Ledoit & Wolf's closed form. Another class joins by its own rows alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from experts.errors import RoutingError

RANK = 128
"""Most principal directions kept of the shared covariance."""
_FLOOR = 1e-6


@dataclass(frozen=True)
class ClassStatistics:
    """Sufficient statistics of features by class; immutable.

    A class may have several prototypes: prompts in the chat form and raw ones lie far apart.

    Attributes:
        owners: (prototypes,) the class of each, sorted, so that those of a class are neighbours.
        means: (prototypes, d) float32 in the original scale.
        scale: (d,) float32, a feature's spread inside the prototypes when the statistics were first fitted.
        count: degrees of freedom that the covariance was estimated from.
        basis: (d, k) float32, orthonormal principal directions of the scaled features inside the prototypes.
        values: (k,) float32, unshrunk variances along them, descending.
        rest: unshrunk variance along every other direction.
        spread: mean of ‖z‖⁴ / d over the rows, which Ledoit & Wolf's intensity needs.
    """

    owners: tuple[str, ...]
    means: Tensor
    scale: Tensor
    count: int
    basis: Tensor
    values: Tensor
    rest: float
    spread: float

    @classmethod
    def fit(
        cls, features: Mapping[str, Tensor], *, prototypes: int = 1, rank: int = RANK
    ) -> "ClassStatistics":
        """Of class → features (n, d), each class split into so many prototypes where it has the rows."""
        parts = [
            (name, part)
            for name in sorted(features)
            for part in split(features[name].to(torch.float32), prototypes)
        ]
        means = torch.stack([part.mean(0) for _, part in parts])
        centred = torch.cat([part - mean for (_, part), mean in zip(parts, means, strict=True)])
        count = max(centred.shape[0] - len(parts), 1)
        scale = (centred.square().sum(0) / count).sqrt()
        # A feature that hardly varies would be blown up to noise.
        scale = scale.clamp(min=max(float(scale.mean()) * 1e-3, _FLOOR))
        d = scale.shape[0]
        blank = cls(
            tuple(name for name, _ in parts),
            means,
            scale,
            0,
            scale.new_zeros(d, 0),
            scale.new_zeros(0),
            0.0,
            0.0,
        )
        return _with_rows(blank, centred / scale, count, rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, sorted."""
        return tuple(dict.fromkeys(self.owners))

    @property
    def width(self) -> int:
        """d, the length of a feature vector."""
        return self.means.shape[1]

    @cached_property
    def shrinkage(self) -> float:
        """Ledoit & Wolf's intensity in [0, 1]: how far the covariance is drawn to a multiple of the identity.

        δ = min(1, (mean ‖zzᵀ − S‖² / n) / ‖S − μI‖²) (A well-conditioned estimator…, JMVA 2004).
        """
        d = self.width
        squares = float(self.values.square().sum()) + (d - self.values.shape[0]) * self.rest**2
        level = self.level
        distance = squares / d - level**2
        if distance <= 0 or not self.count:
            return 1.0
        return min(1.0, max(self.spread - squares / d, 0.0) / self.count / distance)

    @property
    def level(self) -> float:
        """μ, the mean variance."""
        return (float(self.values.sum()) + (self.width - self.values.shape[0]) * self.rest) / self.width

    def whiten(self, features: Tensor) -> Tensor:
        """(n, d) → (n, d) whose shrunk covariance inside a class is the identity."""
        scaled = features / self.scale
        shrink = self.shrinkage
        values = (1 - shrink) * self.values + shrink * self.level
        rest = max((1 - shrink) * self.rest + shrink * self.level, _FLOOR)
        factors = values.clamp(min=_FLOOR).rsqrt() - rest**-0.5
        white: Tensor = scaled * rest**-0.5 + ((scaled @ self.basis) * factors) @ self.basis.T
        return white

    def distances(self, features: Tensor) -> Tensor:
        """(n, d) → (n, prototypes): squared Mahalanobis distances to the means, divided by d."""
        rows, (means, lengths) = self.whiten(features.to(torch.float32)), self._white_means
        squares = rows.square().sum(1, keepdim=True) - 2 * rows @ means.T + lengths
        return squares.clamp(min=0) / self.width

    @cached_property
    def _white_means(self) -> tuple[Tensor, Tensor]:
        """Whitened means (prototypes, d) and their squared lengths (prototypes,)."""
        means = self.whiten(self.means)
        return means, means.square().sum(1)

    def by_class(self, values: Tensor) -> Tensor:
        """(n, prototypes) → (n, classes): the least of each class."""
        columns: dict[str, list[int]] = {}
        for column, owner in enumerate(self.owners):
            columns.setdefault(owner, []).append(column)
        return torch.stack([values[:, own].amin(1) for own in columns.values()], dim=1)

    def joined(
        self, name: str, features: Tensor, *, prototypes: int = 1, rank: int = RANK, pooled: bool = True
    ) -> "ClassStatistics":
        """With one more class, or one known anew; (n, d) are its rows.

        With `pooled` the covariance takes up the rows' spread around their prototypes; what a replaced class
        had added stays.
        """
        parts = split(features.to(torch.float32), prototypes)
        means = [part.mean(0) for part in parts]
        kept = [(owner, mean) for owner, mean in zip(self.owners, self.means, strict=True) if owner != name]
        rows = sorted([*kept, *((name, mean) for mean in means)], key=lambda row: row[0])
        grown = replace(
            self, owners=tuple(owner for owner, _ in rows), means=torch.stack([mean for _, mean in rows])
        )
        centred = torch.cat([part - mean for part, mean in zip(parts, means, strict=True)])
        count = centred.shape[0] - len(parts)
        if not pooled or count < 1:
            return grown
        return _with_rows(grown, centred / self.scale, count, rank)

    def without(self, name: str) -> "ClassStatistics | None":
        """Without a class; None when it was the last. The covariance stays."""
        kept = [i for i, owner in enumerate(self.owners) if owner != name]
        if not kept:
            return None
        return replace(self, owners=tuple(self.owners[i] for i in kept), means=self.means[kept])

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What `read` needs: means and scale as they are, directions in 16 bits."""
        return {
            f"{prefix}means": self.means.contiguous(),
            f"{prefix}scale": self.scale.contiguous(),
            f"{prefix}basis": self.basis.to(torch.float16).contiguous(),
            f"{prefix}values": self.values.contiguous(),
            f"{prefix}moments": torch.tensor(
                [float(self.count), self.rest, self.spread], dtype=torch.float64
            ),
        }

    @classmethod
    def read(
        cls, owners: tuple[str, ...], tensors: Mapping[str, Tensor], prefix: str = ""
    ) -> "ClassStatistics":
        """From what `tensors` gave.

        Raises:
            KeyError: a tensor is missing.
            RoutingError: shapes do not fit each other or the classes.
        """
        means, scale, basis, values, moments = (
            tensors[f"{prefix}{part}"] for part in ("means", "scale", "basis", "values", "moments")
        )
        d = scale.shape[0] if scale.dim() == 1 else -1
        if means.shape != (len(owners), d) or basis.shape != (d, values.shape[0]) or moments.shape != (3,):
            raise RoutingError(
                f"tensors {prefix}means, scale, basis and values do not fit each other or the classes"
            )
        count, rest, spread = moments.tolist()
        return cls(owners, means, scale, int(count), basis.to(torch.float32), values, rest, spread)


def _with_rows(statistics: ClassStatistics, centred: Tensor, count: int, rank: int) -> ClassStatistics:
    """Add scaled rows (n, d), centred on their class, that are worth `count` degrees of freedom."""
    d, before = statistics.width, statistics.count
    total = before + count
    # Principal directions so far and the new rows, as one stack whose Gram matrix is the pooled scatter.
    extra = (statistics.values - statistics.rest).clamp(min=0)
    stack = torch.cat([(extra * before).sqrt()[:, None] * statistics.basis.T, centred])
    if stack.shape[0] <= d:
        gram, vectors = torch.linalg.eigh((stack @ stack.T).double())
        kept = min(rank, stack.shape[0], d)
        gram, vectors = gram.flip(0)[:kept].clamp(min=0), vectors.flip(1)[:, :kept]
        useful = gram > gram[0] * 1e-7 if kept else gram > 0
        gram, vectors = gram[useful], vectors[:, useful]
        basis = (stack.double().T @ vectors) / gram.sqrt()
    else:
        gram, vectors = torch.linalg.eigh((stack.T @ stack).double())
        kept = min(rank, d)
        gram, basis = gram.flip(0)[:kept].clamp(min=0), vectors.flip(1)[:, :kept]
    values = gram / total
    trace = float(stack.square().sum()) / total
    floor = statistics.rest * before / total
    left = d - values.shape[0]
    rest = floor + (max(trace - float(values.sum()), 0.0) / left if left else 0.0)
    fourth = float(centred.square().sum(1).square().sum()) / d
    return replace(
        statistics,
        count=total,
        # As it is stored, so that what is calibrated with it is what is read back.
        basis=basis.to(torch.float16).to(torch.float32).contiguous(),
        values=(values + floor).to(torch.float32),
        rest=rest,
        spread=(statistics.spread * before + fourth) / total,
    )


def split(rows: Tensor, count: int, rounds: int = 10) -> list[Tensor]:
    """Rows (n, d) in at most `count` groups by k-means on scaled features, from far corners; none under 2 rows.

    The first centre is the row farthest from the mean, every further one that farthest from those before, so
    nothing is random.
    """
    if count < 2 or rows.shape[0] < 2 * count:
        return [rows]
    scaled = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp(min=_FLOOR)
    chosen = [int(scaled.square().sum(1).argmax())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(scaled, scaled[chosen]).min(1).values.argmax()))
    centres = scaled[chosen]
    for _ in range(rounds):
        nearest = torch.cdist(scaled, centres).argmin(1)
        centres = torch.stack(
            [scaled[nearest == i].mean(0) if bool((nearest == i).any()) else centres[i] for i in range(count)]
        )
    nearest = torch.cdist(scaled, centres).argmin(1)
    groups = [rows[nearest == i] for i in range(count)]
    return groups if min(group.shape[0] for group in groups) > 1 else [rows]
