"""Routing without data: whose weights respond most to the prompt's states, against a neutral background.

An expert joins by its weights alone. Experts that have prompts are left to a router of another kind with a guard
(`known`): what it knows it keeps, and only prompts that it abstains from are offered to those without prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from experts.errors import RoutingError
from experts.routing import contrast as contrasting
from experts.routing.contrast import Contrast, voted
from experts.routing.energies import Score, energies, standardised
from experts.routing.examples import check_features, checked_rows
from experts.routing.features import FeatureSpec, narrowed
from experts.routing.gaussian import GaussianRouter
from experts.routing.guard import level
from experts.routing.nested import pack, unpack
from experts.routing.router import Abstaining, Router
from experts.routing.storage import misfit, read_config, read_tensors, write_router

GUARD_RATE = 0.01
"""Of the router that learns experts with prompts."""
Scoring = Score | Literal["contrast"]
"""How experts' responses to a prompt become scores: see `energies`, and `contrast` for the default."""
_KNOWN = "known."
_NONE = torch.zeros(0)


class _Config(BaseModel):
    """router.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["subspace"]
    generation: int
    free: tuple[str, ...]
    forms: int
    spec: FeatureSpec
    top_k: int
    threshold: float
    temperature: float
    score: Scoring
    rate: float
    known: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class SubspaceRouter:
    """Experts by their weights, beside those that a router knows by their prompts; immutable.

    Attributes:
        free: experts without prompts, sorted.
        rows: (free, taps, groups, rank, hidden) float32, see `experts.registry.responses`.
        background: (n, d) float32, features of neutral prompts, each in so many `forms`, one after another.
        temperature: divides scores; fixed, since nothing is there to set it by.
        score: see `Scoring`.
        rate: share of neutral prompts that a free expert may claim.
        claim: the score that it takes.
        mean, std: (forms, free, readings) of the responses to neutral prompts, chats and raw ones apart.
        centres: (forms, d) mean features of these, by which a prompt's form is told.
        contrast: rows made ready for the score of that name; None with another one.
        known: knows the other experts by their prompts, abstains from what is none of theirs.
    """

    kind: ClassVar[str] = "subspace"

    free: tuple[str, ...]
    rows: Tensor
    background: Tensor
    forms: int
    spec: FeatureSpec
    generation: int
    top_k: int
    threshold: float
    temperature: float
    score: Scoring
    rate: float
    claim: float
    mean: Tensor
    std: Tensor
    centres: Tensor
    contrast: Contrast | None
    known: Router | None

    @classmethod
    def of(
        cls,
        responses: Mapping[str, Tensor],
        background: Tensor,
        spec: FeatureSpec,
        *,
        forms: int = 1,
        known: Router | None = None,
        top_k: int = 2,
        threshold: float = 0.05,
        temperature: float | None = None,
        score: Scoring = "contrast",
        rate: float = 0.05,
    ) -> "SubspaceRouter":
        """Of expert → (taps, groups, rank, hidden) rows and (n, d) features of neutral prompts by `spec`.

        Consecutive `forms` rows of these are one prompt, chat and raw, whose states differ more than two tasks'.
        Without a temperature it is the one that suits the score.

        Raises:
            RoutingError: shapes do not fit, nothing is chosen among, or `known` cannot abstain.
        """
        free = tuple(sorted(responses))
        if not free and known is None:
            raise RoutingError("a subspace router needs at least one expert's weights")
        if known is not None and not isinstance(known, Abstaining):
            raise RoutingError(
                f"a {known.kind} router cannot abstain, so no expert can join it by its weights"
            )
        if known is not None:
            narrowed(background[:1], spec, known.spec)
        # As they are stored, so that a router read back is the same to the last bit.
        background = background.clamp(-60000, 60000).to(torch.float16).to(torch.float32)
        rows = torch.stack([responses[name].to(torch.float16).float() for name in free]) if free else _NONE
        router = cls(
            free,
            rows,
            background,
            forms,
            spec,
            0,
            top_k,
            threshold,
            _temperature(score) if temperature is None else temperature,
            score,
            rate,
            0.0,
            _NONE,
            _NONE,
            _NONE,
            None,
            known,
        )
        router._check()
        return router._levelled()

    @property
    def names(self) -> tuple[str, ...]:
        """See `Router.names`."""
        return tuple(sorted({*self.free, *(self.known.names if self.known else ())}))

    def scores(self, features: Tensor) -> Tensor:
        """(n, d) → (n, free): how much more a prompt moves each than neutral prompts do."""
        rows = checked_rows(features, self.background.shape[1])
        form = torch.zeros(rows.shape[0], dtype=torch.long)
        if self.forms > 1:
            form = torch.cdist(level(rows, self.spec.size(1)), self.centres).argmin(1)
        scored = standardised if self.contrast is None else voted
        return scored(self._readings(rows, form), self.mean[form], self.std[form])

    @torch.inference_mode()
    def probabilities(self, features: Tensor) -> Tensor:
        """See `Router.probabilities`; a row that `known` does not abstain from is as `known` says."""
        rows = checked_rows(features, self.background.shape[1])
        names = self.names
        found = torch.zeros(rows.shape[0], len(names))
        claimed = torch.zeros(rows.shape[0], dtype=torch.bool)
        if self.known is not None:
            read = narrowed(rows, self.spec, self.known.spec)
            claimed = self._claims_of_known(rows)
            columns = [names.index(name) for name in self.known.names]
            found[:, columns] = self.known.probabilities(read)
        if self.free:
            scores = self.scores(rows)
            offered = ~claimed & (scores.max(1).values > self.claim) if self.known else ~claimed
            columns = [names.index(name) for name in self.free]
            shares = torch.zeros_like(found)
            shares[:, columns] = torch.softmax(scores / self.temperature, dim=1)
            found = torch.where(offered[:, None], shares, found)
        return found

    @torch.inference_mode()
    def abstains(self, features: Tensor) -> Tensor:
        """See `Abstaining.abstains`: neither `known` takes it nor a free expert responds enough."""
        rows = checked_rows(features, self.background.shape[1])
        free = torch.zeros(rows.shape[0], dtype=torch.bool)
        if self.free:
            free = self.scores(rows).max(1).values > self.claim
        return ~(self._claims_of_known(rows) | free)

    def joined_data_free(self, name: str, responses: Tensor) -> "SubspaceRouter":
        """See `DataFree.joined_data_free`; an expert that was known by prompts is known by them no more."""
        known = self.known.without(name) if self.known else None
        # A bundle of an earlier build may keep fewer directions, the strongest ones.
        kept = responses[..., : self.rows.shape[-2], :] if self.free else responses
        rows = {**dict(zip(self.free, self.rows, strict=True)), name: kept.to(torch.float32)}
        return self._with(rows, known)

    def without(self, name: str) -> "SubspaceRouter | None":
        """See `Router.without`."""
        if name not in self.names:
            return self
        known = self.known.without(name) if self.known else None
        rows = {free: each for free, each in zip(self.free, self.rows, strict=True) if free != name}
        return self._with(rows, known) if rows or known else None

    def refitted(self, name: str, training: Tensor, validation: Tensor, seed: int) -> "SubspaceRouter":
        """See `Router.refitted`: the expert is known by its prompts from now on."""
        check_features({name: training}, {name: validation})
        checked_rows(training, self.background.shape[1])
        if self.known is None:
            known: Router = GaussianRouter.fit(
                {name: training}, {name: validation}, self.spec, guard_rate=GUARD_RATE
            )
        else:
            read, held = (narrowed(rows, self.spec, self.known.spec) for rows in (training, validation))
            known = self.known.refitted(name, read, held, seed)
        rows = {free: each for free, each in zip(self.free, self.rows, strict=True) if free != name}
        return self._with(rows, known)

    def describe(self) -> dict[str, Any]:
        """See `Router.describe`."""
        told: dict[str, Any] = {"free": len(self.free), "score": self.score, "claim": self.claim}
        if self.known is not None:
            told["known"] = {"kind": self.known.kind, **self.known.describe()}
        return told

    def at_generation(self, generation: int) -> "SubspaceRouter":
        """See `Router.at_generation`."""
        return replace(self, generation=generation)

    def save(self, folder: Path) -> None:
        """See `Router.save`; rows and background in 16 bits."""
        nested, inner = pack(self.known) if self.known else (None, {})
        config = _Config(
            kind="subspace",
            generation=self.generation,
            free=self.free,
            forms=self.forms,
            spec=self.spec,
            top_k=self.top_k,
            threshold=self.threshold,
            temperature=self.temperature,
            score=self.score,
            rate=self.rate,
            known=nested,
        )
        own = {"rows": self.rows.to(torch.float16), "background": self.background.to(torch.float16)}
        write_router(folder, config, own | {f"{_KNOWN}{key}": tensor for key, tensor in inner.items()})

    @classmethod
    def load(cls, folder: Path) -> "SubspaceRouter":
        """Read what `save` wrote.

        Raises:
            RoutingError: a file is missing or malformed, or its tensors do not fit its description.
        """
        config, tensors = read_config(folder, _Config), read_tensors(folder)
        inner = {k.removeprefix(_KNOWN): v for k, v in tensors.items() if k.startswith(_KNOWN)}
        try:
            rows = dict(zip(config.free, tensors["rows"], strict=True))
            router = cls.of(
                rows,
                tensors["background"],
                config.spec,
                forms=config.forms,
                known=unpack(config.known, inner) if config.known is not None else None,
                top_k=config.top_k,
                threshold=config.threshold,
                temperature=config.temperature,
                score=config.score,
                rate=config.rate,
            )
        except (KeyError, ValueError, RoutingError) as error:
            raise misfit(folder, error) from error
        return router.at_generation(config.generation)

    def _with(self, rows: Mapping[str, Tensor], known: Router | None) -> "SubspaceRouter":
        """The same router over other experts."""
        made = SubspaceRouter.of(
            rows,
            self.background,
            self.spec,
            forms=self.forms,
            known=known,
            top_k=self.top_k,
            threshold=self.threshold,
            temperature=self.temperature,
            score=self.score,
            rate=self.rate,
        )
        return made.at_generation(self.generation)

    def _levelled(self) -> "SubspaceRouter":
        """With the levels of the neutral prompts, and the score above which a free expert claims a prompt."""
        if not self.free:
            return self
        forms = [self.background[first :: self.forms] for first in range(self.forms)]
        ready = None
        if self.score == "contrast":
            ready = Contrast.of(self.rows, self.background, self.forms, self.spec)
        router = replace(self, contrast=ready)
        found = [
            router._readings(form, torch.full((form.shape[0],), index)) for index, form in enumerate(forms)
        ]
        router = replace(
            router,
            mean=torch.stack([each.mean(0) for each in found]),
            std=torch.stack([each.std(0, correction=0) for each in found]),
            centres=torch.stack([level(form, self.spec.size(1)).mean(0) for form in forms]),
        )
        best = router.scores(self.background).max(1).values
        return replace(router, claim=float(torch.quantile(best, 1 - self.rate)))

    def _readings(self, rows: Tensor, form: Tensor) -> Tensor:
        """(n, d) of forms (n,) → (n, free, readings)."""
        if self.contrast is not None:
            return self.contrast.readings(rows, form)
        assert self.score != "contrast"
        return energies(rows, self.rows, self.score)

    def _claims_of_known(self, rows: Tensor) -> Tensor:
        """(n,) bool: prompts that `known` takes."""
        if self.known is None or not isinstance(self.known, Abstaining):
            return torch.zeros(rows.shape[0], dtype=torch.bool)
        return ~self.known.abstains(narrowed(rows, self.spec, self.known.spec))

    def _check(self) -> None:
        """Raise unless rows, background and spec fit."""
        rows = self.background.shape[0] if self.background.dim() == 2 else 0
        if self.forms < 1 or rows < 2 * self.forms or rows % self.forms:
            raise RoutingError(
                "a subspace router needs features of at least 2 neutral prompts, each in every form"
            )
        if not self.free:
            return
        if self.spec.layer == -1:
            raise RoutingError("a subspace router reads decoder layers: choose a layer from 1 below the last")
        per_state = self.spec.size(1)
        fits = self.rows.dim() == 5 and self.rows.shape[:2] == (len(self.free), self.spec.parts)
        if not fits or self.background.shape[1] != per_state * self.rows.shape[-1]:
            raise RoutingError(
                f"rows of shape {tuple(self.rows.shape)} do not fit features {self.background.shape[1]} wide of "
                f"{self.spec.parts} layers"
            )


def _temperature(score: Scoring) -> float:
    """What makes probabilities of scores of that kind."""
    return contrasting.TEMPERATURE if score == "contrast" else 2.0
