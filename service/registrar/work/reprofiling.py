"""A router that knows the generation that serves again, from the profile that was kept with it."""

from experts.errors import StaleRouterError
from experts.registry.records import Generation
from service.registrar.work.routing import current, teach
from service.registrar.work.run import Run


async def reprofile(run: Run) -> None:
    """Carry out a job of kind reprofile. A generation that serves no more needs nothing.

    Raises:
        ExpertsError: its profile or files cannot be had.
        WorkerDiedError: the process ended.
    """
    wanted = str(run.job.request["name"]), int(run.job.request["generation"])
    while True:
        served = (await current(run)).experts.get(wanted[0])
        if served is None or served.number != wanted[1]:
            await _publish_nothing(run)
            return
        try:
            await _fit(run, served)
            return
        except StaleRouterError:
            continue


async def _fit(run: Run, served: Generation) -> None:
    job, at = run.job, f"{served.name}@{served.number}"
    taught = await teach(
        run,
        served.name,
        served.number,
        f"reprofiled {at}",
        expert=served.files,
        profile=served.profile,
    )
    await run.store(taught.files)
    run.gauge.at("publish")
    result = {"name": served.name, "generation": served.number, "router": taught.routed.by}
    await run.publish(
        lambda: run.catalogue.publish(
            job.id, job.attempt, None, taught.router, taught.fitted_on, result=result
        )
    )


async def _publish_nothing(run: Run) -> None:
    job = run.job
    result = {"router": "kept", "note": "the generation serves no more"}
    await run.publish(lambda: run.catalogue.publish(job.id, job.attempt, None, None, None, result=result))
