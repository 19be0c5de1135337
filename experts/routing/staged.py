"""Two routers, one behind the other: a coarse one on a shallow layer answers where it is certain, else a fine one.

A cascade with early exit on calibrated confidence, as in FrugalGPT (arXiv 2305.05176) and BranchyNet (arXiv
1709.01686). What the coarse stage settles needs no layer above its own, which is where a routing pass spends
its time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from experts.errors import RoutingError
from experts.routing.certainty import NEVER, StageRecord, certain_from, compared
from experts.routing.examples import check_features, sample, stack
from experts.routing.features import FeatureSpec, narrowed
from experts.routing.mlp import MlpRouter
from experts.routing.nested import pack, unpack
from experts.routing.router import WEIGHTS_NAME, Abstaining, Router, judged
from experts.routing.storage import read_config, read_tensors, write_router

KEPT = 50
"""Validation features kept for each expert, by which the certainty is set anew when experts come and go."""

Fit = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], FeatureSpec], Router]
"""Training and validation features by expert, and their spec → a router."""


class _Config(BaseModel):
    """router.json; the stages' own ones inside, their tensors under the stage's name and a dot."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["staged"]
    generation: int
    spec: FeatureSpec
    top_k: int
    threshold: float
    certainty: float
    margin: float
    tolerance: float
    record: StageRecord
    coarse: dict[str, Any]
    fine: dict[str, Any]


_PLAIN = ("spec", "generation", "top_k", "threshold", "certainty", "margin", "tolerance", "record")
"""Fields that router.json holds as they are."""


@dataclass(frozen=True, slots=True)
class StagedRouter:
    """A coarse and a fine router over the same experts; immutable.

    Attributes:
        certainty: confidence from which on the coarse stage's word holds.
        margin, tolerance: as `certain_from` was given them.
        held: expert → kept validation features, float16 (n, d).
    """

    kind: ClassVar[str] = "staged"

    coarse: Router
    fine: Router
    spec: FeatureSpec
    generation: int
    top_k: int
    threshold: float
    certainty: float
    margin: float
    tolerance: float
    held: Mapping[str, Tensor]
    record: StageRecord

    @classmethod
    def fit(
        cls,
        training: Mapping[str, Tensor],
        validation: Mapping[str, Tensor],
        spec: FeatureSpec,
        *,
        coarse: Fit = MlpRouter.fit,
        fine: Fit = MlpRouter.fit,
        fine_reads: Literal["all", "deepest"] = "all",
        top_k: int = 2,
        threshold: float = 0.05,
        margin: float = 0.25,
        tolerance: float = 0.0,
    ) -> "StagedRouter":
        """Fit both stages on expert → features (n, d) float32 of a spec with taps, and set the certainty.

        Args:
            coarse, fine: what makes the stages; the coarse one is given features of the first tap only. Where the
                fine one has a guard the coarse one should too: what it settles, no other guard sees.
            fine_reads: whether the fine one is given all layers or the last.
            margin, tolerance: see `certain_from`.

        Raises:
            RoutingError: the spec has no tap, or a stage cannot be fitted.
        """
        shallow = first_tap(spec)
        deep = spec if fine_reads == "all" else spec.model_copy(update={"taps": ()})

        def stage(make: Fit, part: FeatureSpec) -> Router:
            read, held = (
                {name: narrowed(rows, spec, part) for name, rows in split.items()}
                for split in (training, validation)
            )
            return make(read, held, part)

        check_features(training, validation)
        return cls.of(
            stage(coarse, shallow),
            stage(fine, deep),
            validation,
            spec,
            top_k=top_k,
            threshold=threshold,
            margin=margin,
            tolerance=tolerance,
        )

    @classmethod
    def of(
        cls,
        coarse: Router,
        fine: Router,
        validation: Mapping[str, Tensor],
        spec: FeatureSpec,
        *,
        top_k: int = 2,
        threshold: float = 0.05,
        margin: float = 0.25,
        tolerance: float = 0.0,
    ) -> "StagedRouter":
        """Put two routers together whose specs read the first tap, and some or all layers, of `spec`.

        Args:
            validation: expert → features (n, d) float32 by `spec`, unseen by both.

        Raises:
            RoutingError: they choose among different experts, or read what `spec` does not.
        """
        held = {name: sample(validation[name], KEPT) for name in sorted(validation)}
        blank = StageRecord(features=0, settled=0, coarse=0, fine=0, staged=0)
        router = cls(coarse, fine, spec, 0, top_k, threshold, NEVER, margin, tolerance, held, blank)
        router._check()
        return router._set(validation)

    @property
    def names(self) -> tuple[str, ...]:
        """See `Router.names`."""
        return self.fine.names

    @torch.inference_mode()
    def settles(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See `Settling.settles`; what the coarse stage would abstain from is for the fine one to judge."""
        row = self.coarse.probabilities(features)
        certain = row.max(1).values >= self.certainty
        if isinstance(self.coarse, Abstaining) and bool(certain.any()):
            certain &= ~self.coarse.abstains(features)
        return row, certain

    def probabilities(self, features: Tensor) -> Tensor:
        """See `Router.probabilities`; the fine stage is asked only for rows that the coarse one does not settle."""
        return self.judges(features)[0]

    def abstains(self, features: Tensor) -> Tensor:
        """See `Abstaining.abstains`: as the fine stage does, of rows that the coarse one does not settle."""
        return self.judges(features)[1]

    @torch.inference_mode()
    def judges(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See `Judging.judges`: the coarse stage is asked once for both."""
        found, certain = self.settles(narrowed(features, self.spec, self.coarse.spec))
        silent = torch.zeros_like(certain)
        # A row that was settled in a batch, and so not read deeper, may miss the certainty by a rounding alone.
        certain = certain | features.to(device="cpu").isnan().any(1)
        if not bool(certain.all()):
            open_rows = narrowed(features.to(device="cpu")[~certain], self.spec, self.fine.spec)
            found = found.clone()
            found[~certain], silent[~certain] = judged(self.fine, open_rows)
        return found, silent

    def without(self, name: str) -> "StagedRouter | None":
        """See `Router.without`; the certainty is set anew by the others' kept features."""
        if name not in self.names:
            return self
        coarse, fine = self.coarse.without(name), self.fine.without(name)
        if coarse is None or fine is None:
            return None
        held = {other: rows for other, rows in self.held.items() if other != name}
        return replace(self, coarse=coarse, fine=fine, held=held)._set(held)

    def refitted(self, name: str, training: Tensor, validation: Tensor, seed: int) -> "StagedRouter":
        """See `Router.refitted`: both stages are, and the certainty is set anew."""

        def stage(router: Router) -> Router:
            read, kept = (narrowed(rows, self.spec, router.spec) for rows in (training, validation))
            return router.refitted(name, read, kept, seed)

        held = {**self.held, name: sample(validation, KEPT)}
        held = {each: held[each] for each in sorted(held)}
        router = replace(self, coarse=stage(self.coarse), fine=stage(self.fine), held=held)
        return router._set(held)

    def at_generation(self, generation: int) -> "StagedRouter":
        """See `Router.at_generation`."""
        return replace(self, generation=generation)

    def describe(self) -> dict[str, Any]:
        """See `Router.describe`."""
        return {
            "certainty": self.certainty,
            "validation_accuracy": self.record.staged,
            "settled": self.record.settled,
            "stages": {
                stage: {"kind": router.kind, "spec": router.spec.model_dump(), **router.describe()}
                for stage, router in (("coarse", self.coarse), ("fine", self.fine))
            },
            "fit": self.record.model_dump(mode="json"),
        }

    def save(self, folder: Path) -> None:
        """See `Router.save`."""
        write_router(folder, *self.packed())

    def packed(self) -> tuple[BaseModel, dict[str, Tensor]]:
        """See `Packable.packed`."""
        configs, tensors = {}, {f"held.{name}": rows for name, rows in self.held.items()}
        for stage, router in (("coarse", self.coarse), ("fine", self.fine)):
            configs[stage], own = pack(router)
            tensors |= {f"{stage}.{name}": tensor for name, tensor in own.items()}
        plain = {name: getattr(self, name) for name in _PLAIN}
        return _Config(kind="staged", coarse=configs["coarse"], fine=configs["fine"], **plain), tensors

    @classmethod
    def load(cls, folder: Path) -> "StagedRouter":
        """Read what `save` wrote.

        Raises:
            RoutingError: a file is missing or malformed, or a stage's kind cannot be read.
        """
        config, tensors = read_config(folder, _Config), read_tensors(folder)
        path = folder / WEIGHTS_NAME
        try:
            coarse, fine = (
                unpack(own, {name[len(stage) :]: tensors[name] for name in tensors if name.startswith(stage)})
                for stage, own in (("coarse.", config.coarse), ("fine.", config.fine))
            )
        except RoutingError as error:
            raise RoutingError(f"{path}: a stage cannot be read ({error}); restore the file") from error
        held = {name: tensors[f"held.{name}"] for name in fine.names if f"held.{name}" in tensors}
        if set(held) != set(fine.names):
            raise RoutingError(f"{path}: held features of an expert are missing; restore the file")
        router = cls(coarse=coarse, fine=fine, held=held, **{name: getattr(config, name) for name in _PLAIN})
        router._check()
        return router

    def _check(self) -> None:
        """Raise unless the stages choose among the same experts and read layers of the spec."""
        if self.coarse.names != self.fine.names:
            raise RoutingError(
                f"the stages choose among {list(self.coarse.names)} and {list(self.fine.names)}; fit both on the "
                "same experts"
            )
        if self.coarse.spec != first_tap(self.spec):
            raise RoutingError(
                f"the coarse stage reads layers {list(self.coarse.spec.read)}; it may read the first tap alone, "
                f"{self.spec.taps[0]}"
            )
        narrowed(torch.zeros(0, self.spec.parts), self.spec, self.fine.spec)

    def _set(self, validation: Mapping[str, Tensor]) -> "StagedRouter":
        """With the certainty and the record by expert → validation features (n, d)."""
        features, labels = stack(validation, self.names)
        coarse = self.coarse.probabilities(narrowed(features, self.spec, self.coarse.spec))
        fine = self.fine.probabilities(narrowed(features, self.spec, self.fine.spec))
        certainty = certain_from(coarse, fine, labels, margin=self.margin, tolerance=self.tolerance)
        return replace(self, certainty=certainty, record=compared(coarse, fine, labels, certainty))


def first_tap(spec: FeatureSpec) -> FeatureSpec:
    """What the coarse stage reads of features by `spec`.

    Raises:
        RoutingError: there is no tap.
    """
    if not spec.taps:
        raise RoutingError("a staged router reads a shallow layer first; give its spec at least one tap")
    return spec.model_copy(update={"layer": spec.taps[0], "taps": ()})
