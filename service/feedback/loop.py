"""The feedback loop: adjusts the router's row on the engine thread, learns from ratings on the event loop.

What both sides share is one immutable `Bandit`, exchanged as a whole: `decide` reads the reference once, and only
the event loop writes it. So no lock is needed, and a request is routed by one version from beginning to end.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from experts.errors import RoutingError
from experts.routing import SHARED_ARM, Bandit, BanditSpec, ContextMap, Decision, Router
from service.core import RoutingOutcome
from service.errors import AlreadyRatedError, InvalidRequestError, RequestNotFoundError
from service.feedback.memory import Memory, Routed
from service.feedback.snapshots import Snapshots

_log = logging.getLogger(__name__)

Result = Literal["applied", "frozen", "unknown", "repeated"]

SHARED = "shared"
"""What the shared expert's arm is called outside."""

_WARM_UP = 64
"""Prompts whose features are looked at first where the router does not say how features are distributed."""


class FeedbackSink(Protocol):
    """Gets what is counted."""

    def on_feedback(self, result: Result, reward: float) -> None:
        """A rating arrived."""

    def on_explored(self) -> None:
        """A request was answered by another expert than the best known one."""


@dataclass(frozen=True, slots=True)
class FeedbackOptions:
    """What an operator decides.

    Attributes:
        folder: of the versions; None keeps them in memory.
        remembered: routed requests that can be rated; the oldest go first.
        seconds: for which each can be rated.
        snapshot_every: ratings between two kept versions.
    """

    spec: BanditSpec = field(default_factory=BanditSpec)
    folder: Path | None = None
    remembered: int = 10_000
    seconds: float = 3600.0
    snapshot_every: int = 50


@dataclass(frozen=True, slots=True)
class Change:
    """What a rating did to one arm.

    Attributes:
        part: of the answer that was its.
        before, after: its adjustment of log-odds for this very prompt.
        updates, mean_reward: of the arm now.
    """

    part: float
    before: float
    after: float
    updates: int
    mean_reward: float | None


@dataclass(frozen=True, slots=True)
class Applied:
    """What a rating changed; nothing where the loop is frozen."""

    applied: bool
    version: int
    explored: bool
    experts: Mapping[str, Change]


class Feedback:
    """One served bundle's feedback. `decide` is for the engine thread, all else for the event loop."""

    def __init__(
        self,
        options: FeedbackOptions,
        snapshots: Snapshots,
        stats: FeedbackSink | None = None,
        *,
        names: Collection[str] = (),
        context: ContextMap | None = None,
        seed: int | None = None,
    ) -> None:
        self._options = options
        self._snapshots = snapshots
        self._stats = stats
        self._names = frozenset(names)
        self._memory = Memory(options.remembered, options.seconds)
        self._rng = np.random.default_rng(seed)
        self._seen: list[npt.NDArray[np.float32]] = []
        self._saving = asyncio.Lock()
        self.frozen = False
        found = snapshots.newest(options.spec)
        fits = found is not None and (context is None or found[1].mean.shape == context.mean.shape)
        self._bandit = found[0].retained(self._names) if found and fits else Bandit(options.spec)
        self._context = found[1] if found and fits else context
        self._saved = self._bandit.version
        if found and not fits:
            _log.warning("feedback in %s is of another router's features; it is left alone", options.folder)
            self._bandit = Bandit(options.spec, found[0].version + 1)

    # -- engine thread ------------------------------------------------------------------------------

    def decide(
        self, features: Tensor, static: Mapping[str, float], threshold: float, *, explore: bool
    ) -> Decision | None:
        """Adjust one prompt's routing; None leaves it as it is.

        Args:
            features: (d,) that the router read.
            static: expert → the router's probability, over those that can be chosen.
            threshold: below which gates are dropped.
            explore: this is a request that will be answered, not a question.
        """
        row = features.detach().float().cpu().numpy()
        context = self._context or self._warm_up(row)
        if context is None or not static:
            return None
        try:
            seen = context.of(row)
        except RoutingError:
            _log.exception("feedback does not fit this router; restart without its folder")
            return None
        return self._bandit.decide(
            seen, static, threshold, self._rng if explore and not self.frozen else None
        )

    def _warm_up(self, row: npt.NDArray[np.float32]) -> ContextMap | None:
        if not bool(np.isfinite(row).all()):
            return None
        self._seen.append(row)
        if len(self._seen) < _WARM_UP:
            return None
        rows, spec = np.stack(self._seen), self._options.spec
        self._seen = []
        std = np.maximum(rows.std(0), 1e-6)
        self._context = ContextMap.make(rows.mean(0), std, spec.dims, spec.seed)
        return self._context

    # -- event loop: requests and ratings -----------------------------------------------------------

    def routed(self, request_id: str, client: str, outcome: RoutingOutcome) -> None:
        """Remember an answer that ended, if it was routed with feedback in mind."""
        if not isinstance(outcome.decision, Decision):
            return
        if outcome.explored and self._stats is not None:
            self._stats.on_explored()
        self._memory.put(request_id, Routed(client, outcome.decision, outcome.gates, time.monotonic()))

    async def rate(self, request_id: str, reward: float, client: str) -> Applied:
        """Learn from one rating.

        Args:
            request_id: of one choice of an answer.
            reward: in [-1, 1].
            client: who rates; must be who asked.

        Raises:
            RequestNotFoundError, AlreadyRatedError: as `Memory.find`.
            InvalidRequestError: the reward is out of range.
        """
        try:
            routed = self._memory.find(request_id, client, time.monotonic())
        except AlreadyRatedError:
            self._count("repeated", reward)
            raise
        except RequestNotFoundError:
            self._count("unknown", reward)
            raise
        before, decision = self._bandit, routed.decision
        if self.frozen:
            self._count("frozen", reward)
            return Applied(False, before.version, decision.explored, {})
        # An expert that is gone by now learns no more.
        gates = {name: weight for name, weight in routed.gates.items() if name in self._names}
        if len(gates) < len(routed.gates):
            self._count("unknown", reward)
            routed.rated = True
            return Applied(False, before.version, decision.explored, {})
        try:
            after = before.learned(decision, gates, reward)
        except RoutingError as error:
            raise InvalidRequestError(f"reward: {error}", param="reward") from error
        routed.rated = True
        self._bandit = after
        self._count("applied", reward)
        if after.updates % self._options.snapshot_every == 0:
            await self._keep(after)
        prior = {**decision.static, SHARED_ARM: decision.floor}
        total = sum(abs(weight) for weight in gates.values())
        changes = {}
        for name in gates or (SHARED_ARM,):
            probability, arm = prior.get(name, 0.0), after.arms[name]
            changes[name or SHARED] = Change(
                abs(gates[name]) / total if gates else 1.0,
                before.adjustment(name, decision.context, probability),
                after.adjustment(name, decision.context, probability),
                arm.updates,
                arm.mean_reward,
            )
        return Applied(True, after.version, decision.explored, changes)

    def begin_anew(self, router: Router | None) -> None:
        """Other states are read from now on, by another router: what was learnt of the old ones means nothing.

        Answers of before cannot be rated any more.
        """
        self._bandit = self._bandit.cleared()
        self._context = _context_of(router, self._options.spec)
        self._seen = []
        self._memory = Memory(self._options.remembered, self._options.seconds)
        self._names = frozenset(router.names if router is not None else ())

    def retain(self, names: Collection[str]) -> None:
        """These experts are there from now on; what was learnt of others is dropped."""
        self._names = frozenset(names)
        self._bandit = self._bandit.retained(self._names)

    # -- event loop: operators ----------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The present state, JSON-able."""
        bandit = self._bandit
        return {
            "frozen": self.frozen,
            "version": bandit.version,
            "updates": bandit.updates,
            "remembered": len(self._memory),
            "epsilon": bandit.spec.epsilon,
            "cap": bandit.spec.cap,
            "experts": {
                name or SHARED: {
                    "updates": arm.updates,
                    "answers": round(arm.credit, 6),
                    "mean_reward": arm.mean_reward,
                }
                for name, arm in sorted(bandit.arms.items())
            },
            "versions": list(self._snapshots.versions),
        }

    async def reset(self) -> None:
        """Forget all feedback: the static router, under a new version."""
        self._bandit = self._bandit.cleared()
        await self._keep(self._bandit)

    async def rollback(self, version: int) -> None:
        """Go back to what a kept version knew, under a new version.

        Raises:
            InvalidRequestError: no such version is kept.
        """
        earlier = await asyncio.to_thread(self._snapshots.get, version, self._options.spec)
        if earlier is None:
            kept = ", ".join(str(each) for each in self._snapshots.versions) or "none"
            raise InvalidRequestError(f"Version {version} is not kept; kept are: {kept}.", param="version")
        self._bandit = self._bandit.restored(earlier).retained(self._names)
        await self._keep(self._bandit)

    def close(self) -> None:
        """Keep the present version if it is a new one. Blocks."""
        if self._bandit.version != self._saved and self._context is not None:
            self._snapshots.keep(self._bandit, self._context)

    async def _keep(self, bandit: Bandit) -> None:
        context = self._context
        if context is None:
            return
        async with self._saving:
            try:
                await asyncio.to_thread(self._snapshots.keep, bandit, context)
                self._saved = bandit.version
            except OSError:
                _log.exception("this version of the feedback cannot be written; it lives in memory alone")

    def _count(self, result: Result, reward: float) -> None:
        if self._stats is not None:
            self._stats.on_feedback(result, reward)


def open_feedback(
    options: FeedbackOptions, router: Router | None, stats: FeedbackSink | None = None
) -> Feedback:
    """Feedback over a router, resumed from its folder where there is something to resume.

    A router that has `mean` and `std` (d,) of its features, as the built-in one, is adjusted from the first request
    on; of another one's features a few dozen prompts are looked at first.

    Raises:
        OSError: the folder cannot be made or read.
    """
    context = _context_of(router, options.spec)
    names = router.names if router is not None else ()
    return Feedback(options, Snapshots(options.folder), stats, names=names, context=context)


def _context_of(router: Router | None, spec: BanditSpec) -> ContextMap | None:
    """None for a router that does not say how its features are distributed."""
    mean, std = getattr(router, "mean", None), getattr(router, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.dim() == 1 and mean.shape == std.shape:
        return ContextMap.make(mean.float().numpy(), std.float().numpy(), spec.dims, spec.seed)
    return None
