"""An expert that is prepared → a router that knows it."""

from pathlib import Path
from typing import Literal

from experts.bundle import Bundle
from experts.bundle_expert import read_expert
from experts.bundle_files import digest, read_router
from experts.bundle_manifest import ROUTER_FILES
from experts.registry.fitting import Background
from experts.registry.refit import join_by_weights, known_by_prompts, refit_router, task_of
from experts.registry.responses import Task, of_expert
from experts.registry.work.profiles import read_profile
from experts.registry.work.stages import Desk
from experts.registry.work.tasks import ROUTER, Routed, RouteTask
from experts.routing import Router, among


def route(task: RouteTask, desk: Desk) -> Routed:
    """Write the new router below `router/` of the task's folder, if there is to be one.

    Raises:
        RoutingError: the features do not fit the router.
        BlobError, CorruptBundleError: the current router cannot be read.
    """
    desk.step("route", 0)
    if task.router is None:
        return Routed()
    bundle = desk.bundle(task.bundle, task.build_id)
    current = among(read_router(desk.blobs.folder(task.router.files)), task.keep)
    if current is None:
        return Routed()
    if task.profile is not None:
        local = task.profile if isinstance(task.profile, Path) else desk.blobs.path(task.profile)
        features, forms = read_profile(local)
        made: Router | None = refit_router(current, task.name, features, forms=forms, replace=True)
        return _written(task, made, "prompts", desk)
    if known_by_prompts(current, task.name):
        return Routed(by="kept", names=current.names)
    background = None if task.background is None else Background(*read_profile(task.background))
    changes = _changes(task, bundle, desk)
    made = join_by_weights(current, bundle, task.name, changes, background=background)
    return _written(task, made, "weights", desk)


def _changes(task: RouteTask, bundle: Bundle, desk: Desk) -> Task:
    if task.source is not None:
        return task_of(bundle, task.name, task.source)
    assert task.expert is not None, "a route by weights needs a source or an expert"
    folder = task.expert if isinstance(task.expert, Path) else desk.blobs.folder(task.expert)
    return of_expert(read_expert(folder, task.name, 0), bundle.base_delta)


def _written(task: RouteTask, router: Router | None, by: Literal["prompts", "weights"], desk: Desk) -> Routed:
    if router is None:
        return Routed()
    folder = task.folder / ROUTER
    folder.mkdir(exist_ok=True)
    router.save(folder)
    desk.step("route", 1)
    files = {name: digest(folder / name) for name in ROUTER_FILES}
    return Routed(files=files, names=router.names, by=by)
