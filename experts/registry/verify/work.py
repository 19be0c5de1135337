"""Whether everything that is under way has somebody who does it: replicas, jobs, generations, pins."""

import threading
from collections.abc import Iterator
from functools import partial

from experts.errors import RecordNotFoundError
from experts.registry.catalogue import Catalogue
from experts.registry.records import ENDED, Actor, Generation, Job, Replica
from experts.registry.verify.findings import Finding, mend
from experts.registry.verify.needs import Needs

_JOBS = 1000


def check_work(
    catalogue: Catalogue, needs: Needs, actor: Actor, *, attempts: int, watch_seconds: float, repair: bool
) -> Iterator[Finding]:
    """Replicas that do not beat, jobs that run on such, generations and pins whose job is over."""
    replicas = {replica.id: replica for replica in catalogue.replicas()}
    running = catalogue.jobs(state="running", limit=_JOBS)
    alive = _alive(catalogue, replicas, watch_seconds) if replicas or running else set()
    for job in running:
        if job.owner not in alive and _runs_still(catalogue, job):
            yield _lost(catalogue, job, attempts, repair=repair)
    for replica in replicas.values():
        if replica.id not in alive:
            yield _dead(catalogue, replica, watch_seconds, repair=repair)
    for of_expert in needs.generations.values():
        for generation in of_expert.values():
            if generation.state == "registering" and _is_stuck(catalogue, generation):
                yield _stuck(catalogue, generation, actor, repair=repair)
    for holder, digests in catalogue.pins().items():
        if _is_stale(catalogue, holder, alive):
            finding = Finding("stale_pin", f"pins of {holder}", f"{len(digests)} blobs are kept for nobody")
            yield mend(finding, "removed", partial(catalogue.unpin_blobs, holder), repair=repair)


def _alive(catalogue: Catalogue, before: dict[str, Replica], watch_seconds: float) -> set[str]:
    """Replicas whose beat moves on while it is watched."""
    threading.Event().wait(watch_seconds)
    return {now.id for now in catalogue.replicas() if now.id not in before or now.beat != before[now.id].beat}


def _dead(catalogue: Catalogue, replica: Replica, watched: float, *, repair: bool) -> Finding:
    finding = Finding(
        "dead_replica", f"replica {replica.id}", f"it said nothing for {watched:g} s; is it dead?"
    )
    return mend(finding, "forgotten", partial(catalogue.drop_replica, replica.id), repair=repair)


def _lost(catalogue: Catalogue, job: Job, attempts: int, *, repair: bool) -> Finding:
    owner = job.owner or ""
    finding = Finding("lost_job", f"job {job.id}", f"it runs on the replica {owner}, which is dead")
    return mend(
        finding,
        "queued again, or failed",
        lambda: catalogue.requeue(owner, attempts),
        repair=repair,
    )


def _runs_still(catalogue: Catalogue, job: Job) -> bool:
    now = catalogue.job(job.id)
    return (now.state, now.owner, now.attempt) == (job.state, job.owner, job.attempt)


def _is_over(catalogue: Catalogue, job_id: str) -> bool:
    try:
        return catalogue.job(job_id).state in ENDED
    except RecordNotFoundError:
        return True


def _is_stale(catalogue: Catalogue, holder: str, alive: set[str]) -> bool:
    """Jobs pin by their id, or by that and a slash; a server that adopts is gone when none is alive.

    All others, such as uploads, know best how long they need theirs.
    """
    job = holder.partition("/")[0]
    if job.startswith("job-"):
        return _is_over(catalogue, job)
    return holder.startswith("adopt-") and not alive


def _is_stuck(catalogue: Catalogue, generation: Generation) -> bool:
    """A job and its generation end in one transaction, so the generation is looked at after its job."""
    if generation.job is not None and not _is_over(catalogue, generation.job):
        return False
    return catalogue.generation(generation.name, generation.number).state == "registering"


def _stuck(catalogue: Catalogue, generation: Generation, actor: Actor, *, repair: bool) -> Finding:
    name, number = generation.name, generation.number
    finding = Finding("stuck_generation", f"expert {name}@{number}", "it is registering, and no job does it")
    return mend(finding, "failed", partial(catalogue.abandon, name, number, actor), repair=repair)
