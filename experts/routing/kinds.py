"""Kind of router → the code that reads it: the built-in ones, and those of installed packages.

A package adds a kind with an entry point of its name in the group `twinserve.routers`::

    [project.entry-points."twinserve.routers"]
    forest = "my_package.forest:Forest.load"

The entry point is a function of the router's folder that gives a `Router` and raises RoutingError where it
cannot. A bundle only names its kind: no code is ever read from it.
"""

import json
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from experts.errors import RoutingError
from experts.routing.router import CONFIG_NAME, Router

GROUP = "twinserve.routers"

Loader = Callable[[Path], Router]

BUILT_IN = {
    "mlp": "MlpRouter",
    "gaussian": "GaussianRouter",
    "nearest": "NearestRouter",
    "subspace": "SubspaceRouter",
    "staged": "StagedRouter",
}
"""Kind → its class, in the module of `experts.routing` that bears the kind's name."""


def router_kinds() -> tuple[str, ...]:
    """Every kind that can be read here, sorted."""
    return tuple(sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))}))


def find_loader(kind: str) -> Loader:
    """What reads routers of a kind. No built-in kind can be taken over by a package.

    Raises:
        RoutingError: nobody knows the kind, or its package cannot be imported.
    """
    if kind in BUILT_IN:
        # Imported when wanted: some kinds nest routers of others, which are found here.
        built_in: Loader = getattr(import_module(f"experts.routing.{kind}"), BUILT_IN[kind]).load
        return built_in
    found = next(iter(entry_points(group=GROUP, name=kind)), None)
    if found is None:
        raise RoutingError(
            f"router kind {kind!r} is unknown; installed are {', '.join(router_kinds())}: install the package "
            f"that declares it in the entry point group {GROUP!r}"
        )
    try:
        loader: Loader = found.load()
    except (ImportError, AttributeError) as error:
        raise RoutingError(
            f"router kind {kind!r}: its entry point {found.value!r} cannot be imported ({error}); mend the "
            "package that declares it"
        ) from error
    return loader


def load_router(folder: Path) -> Router:
    """Read a router of any kind that `save` wrote.

    Raises:
        RoutingError: a file is missing or malformed, or the kind is not installed; names the file.
    """
    path = folder / CONFIG_NAME
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError) as error:
        raise RoutingError(
            f"{path}: not a readable router description ({error}); restore the file"
        ) from error
    if not isinstance(kind, str):
        raise RoutingError(f"{path}: names no kind of router; restore the file")
    try:
        loader = find_loader(kind)
    except RoutingError as error:
        raise RoutingError(f"{path}: {error}") from error
    return loader(folder)
