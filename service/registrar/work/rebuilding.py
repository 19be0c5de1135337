"""A new shared expert over all current experts, or a bundle from elsewhere: stored whole, then switched to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experts.bundle import Bundle
from experts.errors import SignatureError
from experts.registry.rebuild import rebuilt_records
from experts.registry.records import BundleRecord, Generation, RouterGeneration
from experts.registry.work import BUNDLE, Built, BundleTask
from service.registrar.sources import Sources
from service.registrar.work.routing import current
from service.registrar.work.run import Run


async def rebuild(run: Run, sources: Sources) -> None:
    """Carry out a job of kind rebuild. The follower brings it to this replica's engine, as to every other's.

    Raises:
        ExpertsError, TwinserveError: it cannot be built or served beside the current one, or other generations serve
            by now.
        WorkerDiedError: the process ended.
    """
    job, request = run.job, run.job.request
    snapshot = await current(run)
    # Once it is published every replica has to switch: one that cannot would follow no change any more.
    run.live.check_room()
    before = [generation for _, generation in sorted(snapshot.experts.items())]
    folder = await _confined(run, sources, request.get("path"))
    if folder is not None and run.options.keys is not None:
        raise SignatureError(
            "a bundle carries no signature, and this server takes signed experts only; register its experts one "
            "by one"
        )
    task = BundleTask(
        bundle=run.served.bundle.path,
        build_id=snapshot.bundle.build_id,
        folder=run.folder,
        experts=tuple(before),
        router=snapshot.router,
        path=folder,
        base=await _confined(run, sources, request.get("base")),
        request={key: request[key] for key in ("merge", "prompts") if request.get(key)},
    )
    built = await run.worker.ask(task, Built, run.gauge.follow)
    path = folder or run.folder / BUNDLE
    record, experts, router = await run.ask(lambda: _records(path, before if folder is None else ()))
    await run.store({path / name: entry for name, entry in record.files.items()})
    run.live.check_room()
    run.gauge.at("publish")
    result = {"build_id": built.build_id, "experts": [it.name for it in experts]}
    await run.publish(
        lambda: run.catalogue.switch_bundle(
            job.id, job.attempt, record, experts, router, result=result, made_from=_numbers(before, folder)
        )
    )


def _records(
    path: Path, before: Sequence[Generation]
) -> tuple[BundleRecord, list[Generation], RouterGeneration | None]:
    return rebuilt_records(Bundle.open(path, verify=False, lazy=True), before)


def _numbers(before: Sequence[Generation], folder: Path | None) -> dict[str, int]:
    """What a rebuilt bundle was made from; one from elsewhere was made from nothing that serves here."""
    return {} if folder is not None else {it.name: it.number for it in before}


async def _confined(run: Run, sources: Sources, path: Any) -> Path | None:
    """A folder below the experts' root."""
    if path is None:
        return None
    asked: Mapping[str, Any] = {"path": str(path)}
    return await run.ask(lambda: sources.resolve(asked, run.folder))
