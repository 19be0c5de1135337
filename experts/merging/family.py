"""The fine-tunes of one merge as the methods see them: checked changes, and thresholds of whole vectors."""

from collections.abc import Callable, Iterator, Sequence

import torch

from experts.checkpoint import Checkpoint, FineTune
from experts.errors import MergeError
from experts.factors import Delta, LowRank
from experts.merging.blocks import blocks, whole
from experts.merging.breadcrumbs import breadcrumb_bounds
from experts.merging.cache import MergeCache
from experts.merging.dare import dare
from experts.merging.draws import Draws
from experts.merging.methods import Breadcrumbs, DareTies, Ties
from experts.merging.threshold import magnitude_sample, magnitude_threshold, sampled_threshold

Progress = Callable[[str], None]


class Family:
    """A base's fine-tunes, read parameter by parameter."""

    def __init__(
        self, base: Checkpoint, fine_tunes: Sequence[FineTune], cache: MergeCache, progress: Progress
    ) -> None:
        self.base = base
        self.fine_tunes = tuple(fine_tunes)
        self._cache = cache
        self._progress = progress

    def __len__(self) -> int:
        return len(self.fine_tunes)

    def changes(self, name: str) -> list[Delta | None]:
        """θ_t − θ₀ of one parameter for every fine-tune; None where it is untouched.

        Raises:
            MergeError: one is not finite.
        """
        return [self._delta(fine_tune, name) for fine_tune in self.fine_tunes]

    def trimming_thresholds(self, method: Ties | DareTies) -> list[float]:
        """TIES' threshold of each whole task vector; 0, which keeps all, at density 1.

        A task vector's length is that of the parameters that the fine-tune touches: what it trained.
        """
        if method.density == 1:
            return [0.0] * len(self)
        return [self._trimming_threshold(fine_tune, method) for fine_tune in self.fine_tunes]

    def tensor_thresholds(self, changes: Sequence[Delta | None], name: str, density: float) -> list[float]:
        """The same for one parameter alone."""
        return [
            self._cache.remember(
                fine_tune,
                ("trim", name, density),
                lambda change=change: magnitude_threshold(whole(change), density),  # type: ignore[misc]
            )
            if change is not None and density < 1
            else 0.0
            for fine_tune, change in zip(self.fine_tunes, changes, strict=True)
        ]

    def breadcrumb_bounds(
        self, changes: Sequence[Delta | None], name: str, method: Breadcrumbs
    ) -> list[tuple[float, float]]:
        """What Breadcrumbs keeps of each fine-tune's tensor: magnitudes from the first to below the second."""
        return [
            self._cache.remember(
                fine_tune,
                ("breadcrumbs", name, method.density, method.outliers),
                lambda change=change: breadcrumb_bounds(  # type: ignore[misc]
                    whole(change), method.density, method.outliers
                ),
            )
            if change is not None
            else (0.0, float("inf"))
            for fine_tune, change in zip(self.fine_tunes, changes, strict=True)
        ]

    def _trimming_threshold(self, fine_tune: FineTune, method: Ties | DareTies) -> float:
        dropped = (method.drop_rate, method.seed) if isinstance(method, DareTies) else ()

        def pieces() -> Iterator[torch.Tensor]:
            for name in self.base.names:
                change = self._delta(fine_tune, name)
                if change is not None and isinstance(method, DareTies):
                    draws = Draws(method.seed, fine_tune.name, name)
                    yield from (dare(block, method.drop_rate, draws) for block in blocks(change))
                elif change is not None:
                    yield from blocks(change)
                self._progress(f"{fine_tune.name}: trimming threshold: {name}")

        def threshold() -> float:
            sample = self._cache.remember(fine_tune, ("sample", *dropped), lambda: magnitude_sample(pieces()))
            return sampled_threshold(sample, pieces, method.density)

        return self._cache.remember(fine_tune, ("trim", *dropped, method.density), threshold)

    def _delta(self, fine_tune: FineTune, name: str) -> Delta | None:
        return self._cache.delta(fine_tune, name, lambda: _finite_delta(fine_tune, name))


def _finite_delta(fine_tune: FineTune, name: str) -> Delta | None:
    change = fine_tune.delta(name)
    parts = (change.up, change.down) if isinstance(change, LowRank) else (change,)
    if any(part is not None and not torch.isfinite(part).all() for part in parts):
        raise MergeError(f"{fine_tune.name} ({fine_tune.path}): {name} has NaN or Inf; train it again")
    return change
