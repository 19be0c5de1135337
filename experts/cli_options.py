"""What the commands' options mean: merge methods, compressions, what a router reads, name=PATH pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experts.errors import BundleError

if TYPE_CHECKING:
    from experts.compression import CompressionSpec
    from experts.merging.methods import MergeMethod
    from experts.routing import FeatureSpec

Method = Literal[
    "averaging",
    "task-arithmetic",
    "ties",
    "dare",
    "dare-ties",
    "breadcrumbs",
    "della",
    "sce",
    "model-stock",
    "tsv",
    "iso-c",
]


def router_features(layer: int, taps: Sequence[int] = ()) -> "FeatureSpec":
    """What a router that reads `layer`, and `taps` below it, sees.

    Raises:
        RoutingError: there cannot be such a layer.
    """
    from pydantic import ValidationError

    from experts.errors import RoutingError
    from experts.routing import FeatureSpec

    try:
        return FeatureSpec(layer=layer, taps=tuple(sorted(taps)))
    except ValidationError as error:
        raise RoutingError(f"--router-layer: {error.errors()[0]['msg']}") from error


def pairs(option: str, values: list[str] | None) -> dict[str, Path]:
    """name=PATH options as a mapping.

    Raises:
        BundleError: one is not of that form, or a name comes twice.
    """
    found: dict[str, Path] = {}
    for value in values or ():
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise BundleError(f"{option} {value!r} is not of the form name=PATH")
        if name in found:
            raise BundleError(f"{option} names {name!r} twice; give every expert a name of its own")
        found[name] = Path(path)
    return found


def merge_method(method: Method, chosen: Mapping[str, Any]) -> "MergeMethod":
    """The merge method with the options that were given; the others keep the method's defaults."""
    from pydantic import TypeAdapter, ValidationError

    from experts.errors import MergeError
    from experts.merging.methods import MergeMethod

    given = {key: value for key, value in chosen.items() if value is not None}
    adapter: TypeAdapter[MergeMethod] = TypeAdapter(MergeMethod)
    try:
        return adapter.validate_python({"method": method, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][-1]).replace("_", "-").replace("seed", "merge-seed")
        if problem["type"] == "extra_forbidden":
            raise MergeError(f"{option} means nothing to --method {method}; leave it out") from error
        raise MergeError(f"{option} {problem['input']}: {problem['msg']}") from error


def compression_spec(sizes: Mapping[str, Any], dtype: str, extras: str, allocation: str) -> "CompressionSpec":
    """The compression asked for; rank 16 where no size was given."""
    from pydantic import ValidationError

    from experts.compression import CompressionSpec
    from experts.errors import CompressionError

    given = {key: value for key, value in sizes.items() if value is not None} or {"rank": 16}
    try:
        return CompressionSpec.model_validate(
            {**given, "dtype": dtype, "extras": extras, "allocation": allocation}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        where = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
        raise CompressionError(f"{where}{problem['msg']}") from error
