"""The check of a whole registry. It may run beside servers: what they change meanwhile is looked at again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from experts.registry.blobs import Blobs
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor
from experts.registry.verify.findings import Finding, Findings
from experts.registry.verify.needs import Needs, read_needs
from experts.registry.verify.serving import check_experts, check_router
from experts.registry.verify.storage import check_blobs, check_leftovers, check_orphans
from experts.registry.verify.work import check_work

WATCH_SECONDS = 5.0
"""Replicas beat once a second."""

_SYSTEM = Actor("verify")


def verify(
    catalogue: Catalogue,
    blobs: Blobs,
    *,
    repair: bool = False,
    deep: bool = True,
    actor: Actor = _SYSTEM,
    folders: Sequence[Path] = (),
    grace_seconds: float = 0.0,
    watch_seconds: float = WATCH_SECONDS,
    attempts: int = 3,
    jobs: int = 64,
) -> Findings:
    """Look at everything, and mend what can be mended without losing anything that is needed.

    Mending twice does no more than mending once. A blob that is gone or damaged is stored again from a local
    copy where one is left; a generation is never given up for it, since the store may only be the wrong one.

    Args:
        deep: read every blob that is needed; else only sizes are compared.
        folders: where copies of blobs may lie besides the cache, as the served bundle's folder.
        grace_seconds: how long ago a blob must have been stored to be an orphan.
        watch_seconds: how long replicas may be silent.
        attempts: how often a job of a dead replica is begun.
        jobs: most that may wait.

    Raises:
        CatalogueError, BlobError: either cannot be used at all.
    """
    revision = catalogue.revision()
    needs = read_needs(catalogue)
    found = [
        *check_work(catalogue, needs, actor, attempts=attempts, watch_seconds=watch_seconds, repair=repair),
        *check_blobs(catalogue, blobs, needs, folders, repair=repair, deep=deep),
        *_check_serving(catalogue, needs, actor, jobs=jobs, repair=repair),
        *check_orphans(catalogue, blobs, grace_seconds, repair=repair),
        *check_leftovers(blobs, repair=repair),
    ]
    if any(finding.mended for finding in found):
        catalogue.record(actor, "verify", "registry", "ok", {"mended": _counts(found)})
    return Findings(
        revision=revision,
        blobs=len(needs.files),
        nbytes=sum(entry.nbytes for entry in needs.files),
        found=tuple(found),
    )


def _check_serving(
    catalogue: Catalogue, needs: Needs, actor: Actor, *, jobs: int, repair: bool
) -> Iterator[Finding]:
    snapshot = catalogue.snapshot()
    if snapshot is None:
        return
    yield from check_experts(catalogue, snapshot, needs, actor, repair=repair)
    now = catalogue.snapshot() if repair else snapshot
    if now is not None:
        yield from check_router(catalogue, now, needs, actor, limit=jobs, repair=repair)


def _counts(found: Sequence[Finding]) -> dict[str, int]:
    mended = [finding.kind for finding in found if finding.mended]
    return {kind: mended.count(kind) for kind in sorted(set(mended))}
