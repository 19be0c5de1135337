"""The router's part of a job: which router it begins with, what it is told, and how often."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experts.registry.records import Files, RouterGeneration, Snapshot
from experts.registry.work import ROUTER, FileEntry, Routed, RouteTask
from service.registrar.work.run import Run
from service.registrar.work.served import not_served


@dataclass(frozen=True, slots=True)
class Taught:
    """A router that knows the job's expert, or why there is none.

    Attributes:
        routed: as the worker says.
        router: for the catalogue; None keeps the current one.
        fitted_on: the number of the one that it was made from; None where there was none.
        files: to be stored.
    """

    routed: Routed
    router: RouterGeneration | None
    fitted_on: int | None
    files: Mapping[Path, FileEntry]


async def teach(
    run: Run,
    name: str,
    number: int,
    reason: str,
    *,
    source: Path | None = None,
    expert: Path | Files | None = None,
    profile: Path | FileEntry | None = None,
) -> Taught:
    """Have the router learn a generation, from the one that is current now.

    Args:
        run: the attempt.
        name, number: the generation.
        reason: of the new router, for people.
        source: folder of the fine-tune.
        expert: its files, where the fine-tune is not at hand.
        profile: features of its prompts.

    Raises:
        TransitionError: another bundle is served by now.
        RoutingError: the features cannot be used.
        WorkerDiedError: the process ended.
    """
    snapshot = await current(run)
    served = run.served
    background = None
    if profile is None and snapshot.router is not None:
        begun = snapshot.router
        router = await run.ask(lambda: served.reader.router(begun))
        build_id = snapshot.bundle.build_id
        background = await run.backgrounds.of(run.live, router, build_id, run.steady)
    kept = await run.ask(lambda: {it.name for it in run.catalogue.experts() if it.state != "retired"})
    folder = await asyncio.to_thread(_emptied, run.folder / "routing")
    task = RouteTask(
        bundle=served.bundle.path,
        build_id=snapshot.bundle.build_id,
        name=name,
        folder=folder,
        router=snapshot.router,
        keep=frozenset(kept),
        source=source,
        expert=expert,
        profile=profile,
        background=background,
    )
    routed = await run.worker.ask(task, Routed, run.gauge.follow)
    fitted_on = snapshot.router.number if snapshot.router is not None else None
    if not routed.files or snapshot.router is None:
        return Taught(routed, None, fitted_on, {})
    profiles = {it: at for it, at in snapshot.router.profiles.items() if it in routed.names} | {name: number}
    made = RouterGeneration(0, snapshot.bundle.build_id, profiles, routed.files, reason)
    return Taught(routed, made, fitted_on, {folder / ROUTER / it: at for it, at in routed.files.items()})


async def current(run: Run) -> Snapshot:
    """What is served, as the catalogue says.

    Raises:
        TransitionError: it is another bundle than the one that is served here.
    """
    snapshot = await run.ask(run.catalogue.snapshot)
    own = run.served.bundle.manifest.build_id
    if snapshot is None or snapshot.bundle.build_id != own:
        raise not_served(own)
    return snapshot


def _emptied(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for child in folder.glob(f"{ROUTER}/*"):
        child.unlink()
    return folder
