"""Experts and their generations: which serves, which is kept, which is tried out."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from experts.errors import StaleRouterError
from experts.registry.records import Actor, Expert, ExpertState, Generation, Trial, TrialKind
from service.errors import ExpertNotFoundError, RecordNotFoundError, TwinserveError, WrongStateError
from service.registrar.changing import Changing
from service.registrar.checks import ChangeAsked
from service.registrar.status import ExpertView, merge

T = TypeVar("T")

_log = logging.getLogger(__name__)

_RETIRED = "retired"

_ROUTER_TRIES = 5
"""Then the generation goes live with the router that is current, and a job fits another one."""


class ExpertChanges(Changing):
    """See `Registrar`."""

    async def list(self, *, retired: bool = False) -> Sequence[ExpertView]:
        """Every expert that is not retired, and retired ones that requests still use, or all with `retired`."""
        experts = await self._ask(self._known)
        running = self._live.experts()
        views = [merge(expert, running) for expert in experts]
        return [view for view in views if retired or view.state != _RETIRED or view.generations]

    async def get(self, name: str) -> ExpertView:
        """One expert that is not retired.

        Raises:
            ExpertNotFoundError: there is none of that name.
        """
        expert, _ = await self.expert(name)
        return merge(expert, self._live.experts())

    async def expert(self, name: str) -> tuple[Expert, Sequence[Generation]]:
        """One expert that is not retired, and its generations, newest first.

        Raises:
            ExpertNotFoundError: there is none of that name.
        """
        return await self._ask(self._find, name)

    async def generations(self, name: str) -> Sequence[Generation]:
        """Every generation of a name that was not pruned, newest first, of a retired expert too.

        Raises:
            ExpertNotFoundError: the name never was an expert's.
        """
        found = await self._ask(self.catalogue.generations, name)
        if not found:
            raise _no_expert(name)
        return found

    async def generation(self, name: str, number: int) -> Generation:
        """One generation, whatever its state.

        Raises:
            RecordNotFoundError: there is none.
        """
        return _numbered(await self._ask(self.catalogue.generations, name), name, number)

    async def activate(
        self,
        name: str,
        number: int,
        *,
        asked: ChangeAsked,
    ) -> ExpertView:
        """Let a ready generation serve from now on, with the router of its time where there is one.

        Args:
            name: the expert.
            number: its generation.
            asked: by whom, and on top of which generation.

        Raises:
            ExpertNotFoundError, RecordNotFoundError: there is no such expert or generation.
            ConflictError, PreconditionFailedError: another generation is current than the expected one.
            WrongStateError: the generation is not ready, or of another bundle.
        """
        return await self._switch("activate", name, number, asked, self.catalogue.activate)

    async def rollback(
        self,
        name: str,
        number: int | None = None,
        *,
        asked: ChangeAsked,
    ) -> ExpertView:
        """As `activate`, by default to the newest ready generation before the current one.

        Raises:
            WrongStateError: there is no older one to go back to.
            ExpertNotFoundError, RecordNotFoundError, ConflictError, PreconditionFailedError: as `activate`.
        """
        if number is None:
            expert, generations = await self.expert(name)
            if asked.expected is not None and expert.generation != asked.expected:
                # Refused as by every other change; whether there is an older one is not the question then.
                number = expert.generation or asked.expected
            else:
                number = self._before(expert, generations)
        return await self._switch("rollback", name, number, asked, self.catalogue.activate)

    async def pin(
        self,
        name: str,
        number: int | None = None,
        *,
        asked: ChangeAsked,
    ) -> ExpertView:
        """Keep the current generation, or switch to another and keep that, whatever is registered later.

        Raises:
            ExpertNotFoundError, RecordNotFoundError, WrongStateError, ConflictError, PreconditionFailedError: as
                `activate`.
        """
        current = (await self.expert(name))[0].generation
        if number is not None and number != current:
            return await self._switch("pin", name, number, asked, self.catalogue.pin)
        if current is None:
            raise WrongStateError(f"The expert {name!r} has no ready generation to pin yet.")
        # It is meant as long as it serves: pinned later, it would take the place of what went live in between.
        asked = replace(asked, expected=asked.expected or current)
        await self._asked_for("pin", name, asked, partial(self.catalogue.pin, name, current))
        return await self.get(name)

    async def unpin(self, name: str, *, actor: Actor) -> ExpertView:
        """Let later registrations replace the current generation again."""
        await self.get(name)
        await self._change("unpin", name, actor, lambda: self.catalogue.pin(name, None, actor))
        return await self.get(name)

    async def disable(self, name: str, *, asked: ChangeAsked) -> ExpertView:
        """Serve an expert no more until it is enabled; running requests keep it."""
        return await self._set_state("disable", name, "disabled", asked)

    async def enable(self, name: str, *, asked: ChangeAsked) -> ExpertView:
        """Serve a disabled expert again."""
        return await self._set_state("enable", name, "active", asked)

    async def retire(self, name: str, *, asked: ChangeAsked) -> ExpertView:
        """Take an expert out of service for good; running requests keep it."""
        return await self._set_state("retire", name, "retired", asked)

    async def try_out(
        self,
        name: str,
        number: int,
        kind: TrialKind,
        percent: float,
        *,
        asked: ChangeAsked,
    ) -> ExpertView:
        """Try a ready generation out beside the one that serves, on `percent` of routed requests, in (0, 100].

        Raises:
            ExpertNotFoundError, RecordNotFoundError, WrongStateError, ConflictError, PreconditionFailedError: as
                `activate`.
        """
        if (await self.get(name)).generation is None:
            raise WrongStateError(
                f"The expert {name!r} has no generation that serves, beside which another could be tried; "
                "activate one."
            )
        generation = await self.generation(name, number)
        router = await self._ask(self.catalogue.router_with, name, generation.number)
        trial = Trial(name, number, kind, percent, router)
        return await self._set_trial(name, trial, asked)

    async def end_trial(self, name: str, *, actor: Actor) -> ExpertView:
        """Serve the current generation alone again."""
        return await self._set_trial(name, None, ChangeAsked(actor))

    async def _asked_for(self, action: str, name: str, asked: ChangeAsked, change: Callable[..., T]) -> T:
        """A change of the catalogue that takes who asks, and `expected`."""
        return await self._change(
            action,
            name,
            asked.actor,
            partial(change, asked.actor, expected=asked.expected),
            precondition=asked.precondition,
        )

    async def _switch(
        self, action: str, name: str, number: int, asked: ChangeAsked, change: Callable[..., Expert]
    ) -> ExpertView:
        """Another generation, with a router that knows it; a job makes one where there is none.

        Args:
            change: `activate` or `pin` of the catalogue.
        """
        generation = _numbered(await self.generations(name), name, number)
        router = await self._asked_for(action, name, asked, partial(self._serve, change, generation))
        if router is None and self._follower.routed:
            await self._reprofile(generation, asked.actor)
        return await self.get(name)

    def _serve(
        self, change: Callable[..., Expert], generation: Generation, actor: Actor, expected: int | None
    ) -> int | None:
        """Serve a generation; the number of the router that went live with it, None where none knows it.

        A registration of another expert that puts its router live in between is no reason to refuse.
        """
        name, number = generation.name, generation.number
        for _ in range(_ROUTER_TRIES):
            router = self.catalogue.router_with(name, number)
            with contextlib.suppress(StaleRouterError):
                change(name, number, actor, expected=expected, router=router)
                return router
        change(name, number, actor, expected=expected)
        return None

    async def _reprofile(self, generation: Generation, actor: Actor) -> None:
        """Queue a router that knows this generation again; the switch holds without it."""
        request = {"name": generation.name, "generation": generation.number}
        try:
            await self._submit("reprofile", request, actor, None, name=generation.name, replace=True)
        except TwinserveError as error:
            _log.warning("the router is not fitted to %s@%d: %s", generation.name, generation.number, error)

    async def _set_state(self, action: str, name: str, state: ExpertState, asked: ChangeAsked) -> ExpertView:
        await self.get(name)
        await self._asked_for(action, name, asked, partial(self.catalogue.set_state, name, state))
        return merge(await self._ask(self.catalogue.expert, name), self._live.experts())

    async def _set_trial(self, name: str, trial: Trial | None, asked: ChangeAsked) -> ExpertView:
        await self._asked_for("trial", name, asked, partial(self.catalogue.try_out, name, trial))
        return await self.get(name)

    def _find(self, name: str) -> tuple[Expert, Sequence[Generation]]:
        generations = self.catalogue.generations(name)
        expert = self.catalogue.expert(name) if generations else None
        if expert is None or expert.state == _RETIRED or not _was_ready(generations):
            raise _no_expert(name)
        return expert, generations

    def _known(self) -> Sequence[Expert]:
        """Without those that only a registration knows that has not come to anything yet."""
        return [
            expert
            for expert in self.catalogue.experts()
            if expert.generation is not None or _was_ready(self.catalogue.generations(expert.name))
        ]

    @staticmethod
    def _before(expert: Expert, generations: Sequence[Generation]) -> int:
        """The newest older one of the same bundle: after a return to a bundle, others lie between its own."""
        current = next((it for it in generations if it.number == expert.generation), None)
        for it in generations:
            if (
                current is not None
                and it.state == "ready"
                and it.build_id == current.build_id
                and it.number < current.number
            ):
                return it.number
        raise WrongStateError(f"The expert {expert.name!r} has no older ready generation to go back to.")


def _numbered(generations: Sequence[Generation], name: str, number: int) -> Generation:
    for generation in generations:
        if generation.number == number:
            return generation
    raise RecordNotFoundError(f"The expert {name[:64]!r} has no generation {number}.")


def _was_ready(generations: Sequence[Generation]) -> bool:
    return any(generation.state in ("ready", "collected") for generation in generations)


def _no_expert(name: str) -> ExpertNotFoundError:
    return ExpertNotFoundError(f"There is no expert {name[:64]!r}; GET /admin/experts lists them.")
