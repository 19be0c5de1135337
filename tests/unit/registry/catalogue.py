"""A small catalogue to try things on: one bundle, experts `a` and `b`, one router."""

import hashlib
import json
from collections.abc import Mapping

from experts.bundle_manifest import FileEntry
from experts.registry.catalogue import Catalogue
from experts.registry.records import Actor, BundleRecord, Files, Generation, Job, RouterGeneration

BUILD = "build-1"
ADMIN = Actor("admin", "192.0.2.1")
LIMIT = 100


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def files(*names: str) -> Files:
    return {f"{name}.json": FileEntry(sha256=digest(name), nbytes=len(name)) for name in names}


def generation(name: str, number: int, build: str = BUILD) -> Generation:
    return Generation(name, number, build, "ready", files(f"{name}@{number} of {build}"))


def router(profiles: Mapping[str, int], build: str = BUILD, number: int = 0) -> RouterGeneration:
    return RouterGeneration(
        number, build, profiles, files(f"router {json.dumps(profiles)} of {build}"), "made"
    )


def adopt(catalogue: Catalogue, *, routed: bool = True) -> None:
    """`a` at generation 3 and `b` at 1; `gone` was retired at 7."""
    manifest = {"experts": {"a": {"generation": 3}, "b": {"generation": 1}, "gone": {"generation": 7}}}
    catalogue.adopt(
        BundleRecord(BUILD, "family", json.dumps(manifest)),
        [generation("a", 3), generation("b", 1)],
        router({"a": 3, "b": 1}, number=2) if routed else None,
    )


def submit(catalogue: Catalogue, name: str, actor: Actor = ADMIN, **options: object) -> Job:
    arguments = {"limit": LIMIT, "replace": True, **options}
    return catalogue.submit("register", {"name": name, "path": f"/{name}"}, actor, name=name, **arguments)


def register(catalogue: Catalogue, name: str, *, profiled: bool = True, **options: object) -> Job:
    """Submit, claim and publish one generation, with a router that knows it."""
    submit(catalogue, name)
    return finish(catalogue, profiled=profiled, **options)


def finish(catalogue: Catalogue, *, profiled: bool = True, **options: object) -> Job:
    """Claim what waits longest, and publish it."""
    job = catalogue.claim("replica")
    assert job is not None
    return publish(catalogue, job, profiled=profiled, **options)


def publish(catalogue: Catalogue, job: Job, *, profiled: bool = True, **options: object) -> Job:
    assert job.name is not None
    assert job.generation is not None
    shot = catalogue.snapshot()
    assert shot is not None
    made = fitted_on = None
    if profiled and shot.router is not None:
        made = router({**shot.router.profiles, job.name: job.generation}, shot.bundle.build_id)
        fitted_on = shot.router.number
    ready = generation(job.name, job.generation, shot.bundle.build_id)
    return catalogue.publish(job.id, job.attempt, ready, made, fitted_on, **options)
