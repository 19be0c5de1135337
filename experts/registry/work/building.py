"""A bundle over all current experts, or one that was built elsewhere and is looked at, in the worker process."""

import json
from pathlib import Path

from experts.bundle import Bundle
from experts.bundle_files import read_router
from experts.bundle_manifest import EXPERT_FILES
from experts.errors import CorruptBlobError, MismatchError
from experts.registry.records import Generation
from experts.registry.work.stages import Desk
from experts.registry.work.tasks import BUNDLE, Built, BundleTask

_SPANS = {"base": (0.0, 0.15), "merge": (0.15, 0.4), "experts": (0.4, 0.9), "route": (0.9, 1.0)}
"""Stage of a rebuild → its share of the whole."""


def build(task: BundleTask, desk: Desk) -> Built:
    """Make the bundle below `bundle/` of the task's folder, or check the one that is given.

    Raises:
        BundleError, CorruptBundleError: the given one is broken.
        MismatchError: it, or the given base, is of another base.
        MergeError: the merge that is asked for makes no sense.
        BlobError: a generation's files cannot be had.
    """
    served = desk.bundle(task.bundle, task.build_id)
    desk.step("build", 0)
    if task.path is not None:
        bundle = Bundle.open(task.path)
        if bundle.manifest.base.fingerprint != served.manifest.base.fingerprint:
            raise MismatchError(
                f"{task.path} is a bundle over another base than the one that is served; build it over that base"
            )
    else:
        bundle = _rebuilt(task, served, desk)
    desk.step("build", 1)
    return Built(build_id=bundle.manifest.build_id, experts=len(bundle.expert_names()))


def _rebuilt(task: BundleTask, served: Bundle, desk: Desk) -> Bundle:
    # Imported here: it loads models, and most tasks do not.
    from experts.registry.rebuild import Member, RebuildPlan, read_method, rebuild_bundle

    def member(generation: Generation) -> Member:
        assert generation.source is not None, "a ready generation says where it came from"
        files = {name: generation.files[name] for name in EXPERT_FILES}
        return Member(
            name=generation.name,
            files=desk.blobs.folder(files),
            source=generation.source,
            origin=desk.blobs.folder(generation.origin) if generation.origin else None,
            compression=generation.compression,
            prompts=_prompts(task, generation, desk),
        )

    def told(stage: str, done: int, total: int, parameter: str) -> None:
        begin, end = _SPANS[stage]
        desk.step("build", begin + (end - begin) * done / max(total, 1), parameter)

    asked = task.request.get("merge")
    plan = RebuildPlan(
        bundle=served,
        members=tuple(member(generation) for generation in task.experts),
        out=task.folder / BUNDLE,
        base=task.base,
        method=read_method(asked) if asked else None,
        router=read_router(desk.blobs.folder(task.router.files)) if task.router is not None else None,
    )
    return rebuild_bundle(plan, told)


def _prompts(task: BundleTask, generation: Generation, desk: Desk) -> tuple[str, ...]:
    """What was asked for, else what was kept with the generation."""
    asked = (task.request.get("prompts") or {}).get(generation.name)
    if asked is not None:
        return tuple(asked)
    if generation.prompts is None:
        return ()
    return _texts(desk.blobs.path(generation.prompts))


def _texts(path: Path) -> tuple[str, ...]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptBlobError(f"{path}: not a list of prompts ({error})") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CorruptBlobError(f"{path}: not a list of prompts")
    return tuple(found)
