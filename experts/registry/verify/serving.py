"""Whether what serves can serve: generations, trials, aliases, and the router that knows them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, Expert, Generation, Snapshot
from experts.registry.verify.findings import Finding, mend
from experts.registry.verify.needs import Needs


def check_experts(
    catalogue: Catalogue, snapshot: Snapshot, needs: Needs, actor: Actor, *, repair: bool
) -> Iterator[Finding]:
    """Experts whose generation cannot serve, trials of such, aliases of names that are gone."""
    experts = {expert.name: expert for expert in catalogue.experts()}
    for expert in experts.values():
        yield from _check_expert(catalogue, snapshot, needs, expert, actor, repair=repair)
    for alias, name in catalogue.aliases().items():
        if name not in experts or experts[name].state == "retired":
            finding = Finding(
                "alias", f"alias {alias}", f"it stands for {name!r}, which is gone; set it anew"
            )
            yield mend(finding, "removed", partial(catalogue.remove_alias, alias, actor), repair=repair)


def _check_expert(
    catalogue: Catalogue, snapshot: Snapshot, needs: Needs, expert: Expert, actor: Actor, *, repair: bool
) -> Iterator[Finding]:
    name, generations = expert.name, needs.generations[expert.name]
    build = snapshot.bundle.build_id
    problem = None if expert.state == "retired" else _unfit(generations, expert.generation, build)
    if problem is not None and expert.state == "active":
        finding = Finding(
            "active_generation", f"expert {name}", f"{problem}; roll it back, or register it again"
        )
        older = _newest_fit(generations, build)
        act: Callable[[], Any]
        if older is not None:
            done, act = f"generation {older} serves", partial(catalogue.activate, name, older, actor)
        else:
            done, act = "disabled", partial(catalogue.set_state, name, "disabled", actor)
        yield mend(finding, done, act, repair=repair)
    if expert.trial is not None:
        problem = _unfit(generations, expert.trial.generation, build)
        if problem is None and expert.trial.router is not None and expert.trial.router not in needs.routers:
            problem = f"its router {expert.trial.router} is not in the catalogue"
        if problem is not None:
            finding = Finding("trial", f"trial of {name}", f"{problem}; end the trial")
            yield mend(finding, "ended", partial(catalogue.try_out, name, None, actor), repair=repair)


def _unfit(generations: Mapping[int, Generation], number: int | None, build: str) -> str | None:
    """Why a generation cannot serve."""
    if number is None:
        return None
    found = generations.get(number)
    if found is None:
        return f"its generation {number} is not in the catalogue"
    if found.state != "ready":
        return f"its generation {number} is {found.state}"
    if found.build_id != build:
        return f"its generation {number} belongs to the bundle {found.build_id}"
    return None


def _newest_fit(generations: Mapping[int, Generation], build: str) -> int | None:
    fit = [number for number in generations if _unfit(generations, number, build) is None]
    return max(fit, default=None)


def check_router(
    catalogue: Catalogue, snapshot: Snapshot, needs: Needs, actor: Actor, *, limit: int, repair: bool
) -> Iterator[Finding]:
    """A router of another bundle, of generations that never were, or one that a lost job should have fitted."""
    router = snapshot.router
    if router is None:
        return
    about = f"router {router.number}"
    if router.build_id != snapshot.bundle.build_id:
        yield Finding("router", about, f"it belongs to the bundle {router.build_id}; rebuild the bundle")
    for name, number in router.profiles.items():
        if number not in needs.generations.get(name, {}):
            yield Finding(
                "router", about, f"it knows {name}@{number}, which is not in the catalogue; {_AGAIN}"
            )
            continue
        serves = snapshot.experts.get(name)
        if serves is None or serves.number == number or serves.profile is None:
            continue
        if any(job.state in ("queued", "running") for job in catalogue.jobs(name=name)):
            continue
        finding = Finding(
            "router", about, f"it knows {name}@{number}, while {name}@{serves.number} serves; {_AGAIN}"
        )
        again = partial(
            catalogue.submit,
            "reprofile",
            {"name": name, "generation": serves.number},
            actor,
            name=name,
            replace=True,
            limit=limit,
        )
        yield mend(finding, "a job of the servers fits it again", again, repair=repair)


_AGAIN = "roll the expert back or forth to have the router fitted again"
