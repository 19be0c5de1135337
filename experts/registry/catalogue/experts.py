"""What admins do to experts that are there: switch generations, pin, disable, retire, try out, name otherwise."""

from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from experts.bundle_manifest import check_name
from experts.errors import (
    DuplicateExpertError,
    GenerationConflictError,
    RecordNotFoundError,
    StaleRouterError,
    TransitionError,
    UnknownExpertError,
)
from experts.registry.catalogue import tables
from experts.registry.catalogue.change import Change, Connected, storable
from experts.registry.catalogue.ending import OPEN, end_jobs_of
from experts.registry.catalogue.rows import expert_of, trial_row
from experts.registry.records import Actor, Expert, ExpertState, Trial

_ACTIONS: dict[ExpertState, str] = {"active": "enable", "disabled": "disable", "retired": "retire"}


class ExpertChanges(Connected):
    """Changes of experts; each is one transaction.

    All take `expected`: the generation that the caller believes to be current. All raise CatalogueError where the
    database cannot be written, UnknownExpertError for a name that has had no generation, and
    GenerationConflictError where another generation than the expected one is current.
    """

    def activate(
        self, name: str, number: int, actor: Actor, *, expected: int | None = None, router: int | None = None
    ) -> Expert:
        """Serve another ready generation, older or newer, at once. A retired expert comes back by it.

        Args:
            router: a router generation that becomes the current one with it; None keeps the current one.

        Raises:
            RecordNotFoundError: there is no such generation, or router.
            TransitionError: the generation is not ready, or either belongs to another bundle or was given up.
            StaleRouterError: the router's profiles are not the current ones with that of this generation.
        """
        with self._change() as change:
            row = change.known_expert(name)
            check_current(row, expected)
            detail = _serve(change, row, number, router)
            if row.state == "retired":
                change.set_expert(name, state="active", pinned=False)
            change.note(actor, "activate", name, detail)
            return _read(change, name)

    def pin(
        self,
        name: str,
        number: int | None,
        actor: Actor,
        *,
        expected: int | None = None,
        router: int | None = None,
    ) -> Expert:
        """Keep a generation live whatever is registered later; None lets registrations go live again.

        A generation that is not the current one goes live by it, as by `activate`.

        Args:
            router: as of `activate`.

        Raises:
            RecordNotFoundError, TransitionError, StaleRouterError: as `activate`.
        """
        with self._change() as change:
            row = change.served_expert(name)
            check_current(row, expected)
            if number is None:
                change.set_expert(name, pinned=False)
                change.note(actor, "unpin", name, {"generation": row.generation})
            else:
                detail = _serve(change, row, number, router)
                change.set_expert(name, pinned=True)
                change.note(actor, "pin", name, detail)
            return _read(change, name)

    def set_state(
        self, name: str, state: ExpertState, actor: Actor, *, expected: int | None = None
    ) -> Expert:
        """Enable, disable or retire an expert.

        Retiring ends its trial, its pin, its registrations that wait or run, and the aliases that stand for it; its
        name is free. Only `activate` brings it back.

        Raises:
            UnknownExpertError: it is retired already.
            TransitionError: there is no generation to serve, or it belongs to another bundle.
        """
        with self._change() as change:
            row = change.served_expert(name)
            check_current(row, expected)
            detail: dict[str, Any] = {"from": row.state, "generation": row.generation}
            if state == "active":
                if row.generation is None:
                    raise TransitionError(f"expert {name!r} has no live generation; activate one")
                change.usable_generation(name, row.generation)
                change.set_expert(name, state=state)
            elif state == "disabled":
                change.set_expert(name, state=state)
            else:
                column = tables.aliases.c
                gone = (
                    change.connection.execute(select(column.alias).where(column.name == name)).scalars().all()
                )
                change.connection.execute(delete(tables.aliases).where(column.name == name))
                change.set_expert(name, state=state, trial=None, pinned=False)
                change.left(name, row.generation)
                if row.trial is not None:
                    change.left(name, row.trial["generation"])
                _forget_way_back(change, name)
                ended = end_jobs_of(change, name, "the expert was retired")
                detail |= {"aliases": sorted(gone), "jobs": ended}
            change.note(actor, _ACTIONS[state], name, detail)
            return _read(change, name)

    def try_out(self, name: str, trial: Trial | None, actor: Actor, expected: int | None = None) -> Expert:
        """Begin, change or end (None) the trial of a generation beside the one that serves.

        Raises:
            RecordNotFoundError: there is no such generation, or router.
            TransitionError: it serves already or is not ready, or the share is not in (0, 100].
        """
        with self._change() as change:
            row = change.served_expert(name)
            check_current(row, expected)
            if trial is not None:
                check_trial(change, row.generation, trial)
            set_trial(change, row, trial)
            detail = {"before": row.trial, "after": trial_row(trial)}
            change.note(actor, "trial", name, detail)
            return _read(change, name)

    def set_alias(self, alias: str, name: str, actor: Actor) -> None:
        """Let another name stand for an expert, from now on.

        Raises:
            BundleError: the alias is no name.
            DuplicateExpertError: an expert or the bundle has that name.
            UnknownExpertError: there is no such expert, or it was retired.
        """
        check_name(alias)
        with self._change() as change:
            build = change.served_build()
            named = change.connection.execute(
                select(tables.bundles.c.name).where(tables.bundles.c.build_id == build)
            ).scalar_one()
            if _named(change, alias):
                raise DuplicateExpertError(f"{alias!r} is an expert's name; choose another alias")
            if alias == named:
                raise DuplicateExpertError(f"{alias!r} is the bundle's name; choose another alias")
            change.served_expert(name)
            columns = tables.aliases.c
            before = change.connection.execute(
                select(columns.name).where(columns.alias == alias)
            ).scalar_one_or_none()
            if before is None:
                change.connection.execute(insert(tables.aliases).values(alias=alias, name=name))
            else:
                change.connection.execute(
                    update(tables.aliases).where(columns.alias == alias).values(name=name)
                )
            change.note(actor, "alias", alias, {"from": before, "to": name})

    def remove_alias(self, alias: str, actor: Actor) -> None:
        """Let an alias stand for nothing.

        Raises:
            RecordNotFoundError: there is none.
        """
        with self._change() as change:
            columns = tables.aliases.c
            before = None
            if storable(alias):
                before = change.connection.execute(
                    select(columns.name).where(columns.alias == alias)
                ).scalar_one_or_none()
            if before is None:
                raise RecordNotFoundError(f"there is no alias {alias!r}")
            change.connection.execute(delete(tables.aliases).where(columns.alias == alias))
            change.note(actor, "unalias", alias, {"from": before})


def check_current(row: Row[Any], expected: int | None) -> None:
    """Compare-and-swap on an expert's generation.

    Raises:
        GenerationConflictError: another generation than the expected one is current.
    """
    if expected is not None and (row.state == "retired" or row.generation != expected):
        raise GenerationConflictError(
            f"expert {row.name!r} is at generation {row.generation}, not {expected}; look again and retry"
        )


def _forget_way_back(change: Change, name: str) -> None:
    """Whoever goes back to another bundle does not bring a retired expert back, whatever has its name by then."""
    columns = tables.bundles.c
    for row in change.connection.execute(select(columns.build_id, columns.way_back)).all():
        if row.way_back is not None and name in row.way_back["experts"]:
            experts = {key: number for key, number in row.way_back["experts"].items() if key != name}
            change.connection.execute(
                update(tables.bundles)
                .where(columns.build_id == row.build_id)
                .values(way_back={**row.way_back, "experts": experts})
            )


def check_free(change: Change, name: str) -> None:
    """Whether an expert, or the bundle, may have this name.

    Raises:
        DuplicateExpertError: it is an alias.
    """
    columns = tables.aliases.c
    if change.connection.execute(select(columns.name).where(columns.alias == name)).first() is not None:
        raise DuplicateExpertError(f"{name!r} is an alias; remove it first, or choose another name")


def check_trial(change: Change, live: int | None, trial: Trial) -> None:
    """Whether a trial can be.

    Raises:
        RecordNotFoundError: there is no such generation, or router.
        TransitionError: the generation serves already or is not ready, or the share is not in (0, 100], or not with
            those of the other experts' trials.
    """
    if not 0 < trial.percent <= 100:
        raise TransitionError(f"a trial takes more than 0 and at most 100 percent, not {trial.percent}")
    if trial.generation == live:
        raise TransitionError(f"generation {live} of {trial.name!r} serves already; it needs no trial")
    others = change.connection.execute(
        select(tables.experts.c.trial).where(
            tables.experts.c.trial.is_not(None), tables.experts.c.name != trial.name
        )
    ).scalars()
    taken = sum(float(other["percent"]) for other in others if other)
    if taken + trial.percent > 100:
        raise TransitionError(
            f"trials of other experts take {taken:g} percent of routed requests, so there is no room for "
            f"{trial.percent:g} more; end one, or take less"
        )
    change.usable_generation(trial.name, trial.generation)
    if trial.router is not None:
        change.router_row(trial.router)


def set_trial(change: Change, row: Row[Any], trial: Trial | None) -> None:
    """Replace an expert's trial."""
    if row.trial is not None and (trial is None or trial.generation != row.trial["generation"]):
        change.left(row.name, row.trial["generation"])
    change.set_expert(row.name, trial=trial_row(trial))


def go_live(change: Change, row: Row[Any], number: int) -> None:
    """Let a generation serve instead of the current one; its trial is over."""
    if row.generation != number:
        change.left(row.name, row.generation)
    change.set_expert(row.name, generation=number)
    if row.trial is not None and row.trial["generation"] == number:
        change.set_expert(row.name, trial=None)


def _serve(change: Change, row: Row[Any], number: int, router: int | None) -> dict[str, Any]:
    """Let a generation serve, with a router that knows it where one is given; what the audit log tells of it."""
    change.usable_generation(row.name, number)
    check_free(change, row.name)
    detail = {"from": row.generation, "to": number}
    if router is not None:
        _switch_router(change, row.name, number, router)
        detail["router"] = router
    go_live(change, row, number)
    return detail


def _switch_router(change: Change, name: str, number: int, router: int) -> None:
    found = change.router_row(router)
    now = {} if change.router is None else change.router_row(change.router).profiles
    if found.profiles != {**now, name: number}:
        raise StaleRouterError(
            f"router generation {router} is not the current one with {name}@{number}; look again and retry"
        )
    change.router = router


def _named(change: Change, name: str) -> bool:
    """Whether an expert has this name, or is about to."""
    row = change.expert_row(name)
    if row is not None and row.state != "retired" and (row.generation or row.trial):
        return True
    columns = tables.jobs.c
    coming = select(columns.id).where(
        columns.name == name, columns.kind == "register", columns.state.in_(OPEN)
    )
    return change.connection.execute(coming).first() is not None


def _read(change: Change, name: str) -> Expert:
    row = change.expert_row(name)
    if row is None:  # It was there when the change began, and nobody else writes.
        raise UnknownExpertError(f"there is no expert {name!r}")
    return expert_of(row)
