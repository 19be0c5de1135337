"""Garbage collection: generations that are old enough to give up, then blobs that nothing needs any more."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from experts.registry.blobs import Blobs, Stored
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, Generation
from experts.registry.verify.needs import read_needs

_TOGETHER = 16
"""Blobs deleted in one transaction, for which all other changes wait."""

_PAUSE_SECONDS = 0.25
"""After one that did not get to all of them: the store is slow, and whoever waits for the lock gets it first."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What was given up.

    Attributes:
        generations: as "name@number".
        blobs: deleted; `nbytes` of them together.
    """

    generations: tuple[str, ...]
    blobs: int
    nbytes: int


def collect_garbage(
    catalogue: Catalogue,
    blobs: Blobs,
    keep: int,
    actor: Actor,
    *,
    retired_before: datetime | None = None,
    grace_seconds: float = 0.0,
    dry_run: bool = False,
) -> Collected:
    """Give up generations beyond the newest `keep` of each expert, then blobs that nothing needs, half ones too.

    The catalogue forgets first: a crash in between leaves blobs that the next collection finds. What a change is
    about to need is pinned before it is put, and no pin can come while blobs are deleted.

    Args:
        retired_before: of experts that were retired later the newest `keep` stay too; None: of no retired one.
        grace_seconds: how long ago blobs must have been stored, by the store's clock.
        dry_run: only tell; of blobs of any age.

    Raises:
        CatalogueError, BlobError: either cannot be used.
    """
    old = catalogue.collectable(keep, retired_before)
    if dry_run:
        gone = list(_would_go(catalogue, blobs, old))
    else:
        # Where no generation goes, routers and bundles may have become useless all the same.
        old = catalogue.collect(old, actor, keep, retired_before)
        gone = list(unneeded(catalogue, blobs, grace_seconds, delete=True))
        with blobs.sweeping():
            for name in blobs.leftovers():
                blobs.remove_leftover(name)
        blobs.tidy()
    return Collected(
        tuple(f"{each.name}@{each.number}" for each in old), len(gone), sum(blob.nbytes for blob in gone)
    )


def _would_go(catalogue: Catalogue, blobs: Blobs, old: Sequence[Generation]) -> Iterator[Stored]:
    """What nothing else needs; without routers that would go with the generations."""
    if catalogue.snapshot() is None:
        return
    needs = read_needs(catalogue, {(each.name, each.number) for each in old})
    needed = {entry.sha256 for entry in needs.files}.union(*catalogue.pins().values())
    yield from (blob for blob in blobs.list() if blob.sha256 not in needed)


def unneeded(
    catalogue: Catalogue, blobs: Blobs, grace_seconds: float = 0.0, *, delete: bool
) -> Iterator[Stored]:
    """Blobs that nothing in the catalogue needs, deleted before they are told if wanted."""
    if catalogue.snapshot() is None:
        return  # of an empty catalogue everything would be garbage: rather is the catalogue the wrong one
    needed = catalogue.referenced()
    oldest = time.time() - grace_seconds
    candidates = (
        blob
        for blob in blobs.list()
        if blob.sha256 not in needed and (not grace_seconds or blob.modified <= oldest)
    )
    while some := {blob.sha256: blob for blob in islice(candidates, _TOGETHER)}:
        while gone := catalogue.discard(some, blobs.delete) if delete else list(some):
            yield from (some.pop(digest) for digest in gone)
            if not some:
                break
            time.sleep(_PAUSE_SECONDS)
