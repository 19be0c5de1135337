"""Merges and exclusive vectors of one base, made once and kept as long as the same ones are asked for."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from experts.checkpoint import Checkpoint, FineTune
from experts.compression import CompressionSpec, compress, exclusive_delta
from experts.compression.curve import CodecPoint, codec_points
from experts.evaluation.systems import Coded, NoShared, OneExpert
from experts.factors import Delta, LowRank, SvdFactors, added
from experts.merging import MergeCache, MergeMethod, merge

Change = Mapping[str, Delta | None]
SharedPlan = MergeMethod | NoShared | OneExpert


@dataclass(frozen=True)
class Exclusive:
    """One expert's exclusive vector.

    Attributes:
        factors: parameter → factors as they are served; empty where the vector is kept as it is.
        change: the same as weight changes.
        nbytes: true stored bytes; 0 where the vector is kept as it is.
        seconds: processor time that it took to make.
    """

    factors: Mapping[str, SvdFactors]
    change: Change
    nbytes: int
    seconds: float


class Weights:
    """Weight changes on θ₀.

    Args:
        base: θ₀.
        fine_tunes: by name.
    """

    def __init__(self, base: Checkpoint, fine_tunes: Mapping[str, FineTune]) -> None:
        self.base, self.fine_tunes = base, fine_tunes
        self.build_seconds = 0.0
        self._cache = MergeCache()
        self._merged: tuple[str, Change, float] = ("", {}, 0.0)
        self._exclusive: dict[str, Exclusive] = {}
        self._exclusive_of = ""

    def fine_tune(self, name: str) -> Change:
        """θ_t − θ₀."""
        fine_tune = self.fine_tunes[name]
        return {
            parameter: self._cache.delta(fine_tune, parameter, lambda p=parameter: fine_tune.delta(p))  # type: ignore[misc]
            for parameter in self.base.names
        }

    def shared(self, plan: SharedPlan, experts: tuple[str, ...]) -> Change:
        """θ* − θ₀. Sets `build_seconds` to the processor time that the merge took."""
        self.build_seconds = 0.0
        match plan:
            case NoShared():
                return dict.fromkeys(self.base.names)
            case OneExpert():
                return self.fine_tune(plan.name)
            case _:
                return self._scaled_merge(plan, experts)

    def exclusive(
        self, name: str, plan: SharedPlan, experts: tuple[str, ...], spec: CompressionSpec | None
    ) -> Exclusive:
        """v_t = θ_t − θ*, compressed."""
        of = f"{plan.model_dump_json()} {experts} {spec.model_dump_json() if spec else ''}"
        if of != self._exclusive_of:
            self._exclusive, self._exclusive_of = {}, of
        if name not in self._exclusive:
            shared = self.shared(plan, experts)
            started = time.process_time()
            own = self.fine_tune(name)
            deltas = ((parameter, exclusive_delta(own[parameter], shared[parameter])) for parameter in own)
            if spec is None:
                made = Exclusive({}, dict(deltas), 0, 0.0)
            else:
                kept = compress(deltas, spec)
                change: Change = {**{p: f.low_rank() for p, f in kept.factors.items()}, **kept.exact}
                made = Exclusive(kept.factors, change, kept.nbytes, time.process_time() - started)
            self._exclusive[name] = made
        return self._exclusive[name]

    def coded(self, name: str, system: Coded, experts: tuple[str, ...]) -> CodecPoint | None:
        """v_t in the form and at the size asked for; None where the form cannot be so small."""
        shared, own = self.shared(system.shared, experts), self.fine_tune(name)

        def deltas() -> Iterator[tuple[str, Delta | None]]:
            return ((parameter, exclusive_delta(own[parameter], shared[parameter])) for parameter in own)

        fractions = () if system.fraction is None else (system.fraction,)
        points = codec_points(deltas, self.base.nbytes, (system.form,), fractions, seed=system.seed)
        return next(points, None)

    def _scaled_merge(self, method: MergeMethod, experts: tuple[str, ...]) -> Change:
        """Every method is linear in its λ, so one merge serves all of them."""
        scale = float(getattr(method, "scale", 1.0))
        unit = method.model_copy(update={"scale": 1.0}) if hasattr(method, "scale") else method
        of = f"{unit.model_dump_json()} {experts}"
        if self._merged[0] != of:
            # The last one goes first: two whole models of changes need not lie side by side.
            self._merged = ("", {}, 0.0)
            started = time.process_time()
            whole = dict(
                merge(self.base, [self.fine_tunes[name] for name in experts], unit, cache=self._cache)
            )
            self._merged = (of, whole, time.process_time() - started)
        _, made, self.build_seconds = self._merged
        return made if scale == 1.0 else {name: _scaled(delta, scale) for name, delta in made.items()}


def both(first: Change, second: Change) -> Iterator[tuple[str, Delta | None]]:
    """The sum of two changes; low-rank stays low-rank where both are."""
    for name in dict.fromkeys([*first, *second]):
        yield name, added(first.get(name), second.get(name))


def _scaled(delta: Delta | None, scale: float) -> Delta | None:
    if delta is None:
        return None
    return delta.scaled(scale) if isinstance(delta, LowRank) else delta * scale
