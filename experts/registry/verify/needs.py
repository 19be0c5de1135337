"""Which files the catalogue needs, and what for."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from experts.bundle_manifest import FileEntry
from experts.registry.catalogue import Catalogue
from experts.registry.records import BundleRecord, Generation, JobState, RouterGeneration

_WAITING: tuple[JobState, ...] = ("queued", "running")
_MOST_JOBS = 100_000


@dataclass(frozen=True, slots=True)
class Needs:
    """What is in the catalogue, read piece by piece while others may change it.

    Attributes:
        generations: expert → number → generation.
        files: blob → what needs it, for people.
    """

    generations: Mapping[str, Mapping[int, Generation]]
    routers: Mapping[int, RouterGeneration]
    files: Mapping[FileEntry, tuple[str, ...]]


def read_needs(catalogue: Catalogue, without: Collection[tuple[str, int]] = ()) -> Needs:
    """Read it; the files of generations `without` are left out.

    Raises:
        CatalogueError: it cannot be read.
    """
    # First: what a job makes is in the records before the job has ended.
    uploads = list(_of_jobs(catalogue))
    generations = {
        expert.name: {each.number: each for each in catalogue.generations(expert.name)}
        for expert in catalogue.experts()
    }
    routers = {each.number: each for each in catalogue.routers()}
    files: dict[FileEntry, list[str]] = defaultdict(list)
    for what, entry in uploads:
        files[entry].append(what)
    for of_expert in generations.values():
        for generation in of_expert.values():
            if (generation.name, generation.number) in without:
                continue
            for what, entry in _of_generation(generation):
                files[entry].append(what)
    for router in routers.values():
        for name, entry in router.files.items():
            files[entry].append(f"router {router.number}, {name}")
    for bundle in catalogue.bundles():
        for name, entry in _of_bundle(bundle):
            files[entry].append(f"bundle {bundle.build_id}, {name}")
    return Needs(generations, routers, {entry: tuple(what) for entry, what in files.items()})


def _of_jobs(catalogue: Catalogue) -> Iterator[tuple[str, FileEntry]]:
    """Uploads that jobs are yet to read."""
    for state in _WAITING:
        for job in catalogue.jobs(state=state, limit=_MOST_JOBS):
            for name, entry in job.request.get("files", {}).items():
                yield f"{job.id}, the upload's {name}", FileEntry.model_validate(entry)


def _of_generation(generation: Generation) -> Iterator[tuple[str, FileEntry]]:
    if generation.state != "ready":
        return  # nothing was promised of it
    told = f"expert {generation.name}@{generation.number}"
    for name, entry in generation.files.items():
        yield f"{told}, {name}", entry
    for name, entry in generation.origin.items():
        yield f"{told}, the fine-tune's {name}", entry
    if generation.profile is not None:
        yield f"{told}, its prompts' features", generation.profile
    if generation.prompts is not None:
        yield f"{told}, its prompts", generation.prompts


def _of_bundle(bundle: BundleRecord) -> Iterator[tuple[str, FileEntry]]:
    if bundle.state != "failed":
        yield from bundle.files.items()
