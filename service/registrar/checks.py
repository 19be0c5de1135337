"""What a registration must be before any work is done for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experts.bundle import Manifest, check_name
from experts.errors import BundleError
from experts.registry import MIN_PROMPTS
from service.errors import ConflictError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Registration:
    """What an administrator asks for; see `api.wire.admin.RegisterBody`."""

    name: str
    path: str
    size: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    expected_generation: int | None = None
    replace: bool = False


def check_registration(asked: Registration, manifest: Manifest) -> int | None:
    """The generation that the registration replaces; None where it adds an expert.

    Raises:
        InvalidRequestError: an impossible name, or prompts that cannot be profiled.
        ConflictError: the name is taken, or its generation is not the expected one.
    """
    expected = _expected_generation(asked, manifest)
    _check_prompts(asked.prompts, manifest)
    return expected


def _expected_generation(asked: Registration, manifest: Manifest) -> int | None:
    """What the bundle must hold for this registration to go ahead: that generation, or nothing."""
    try:
        check_name(asked.name)
    except BundleError as error:
        raise InvalidRequestError(f"{error}.", param="name") from error
    if asked.name == manifest.name:
        raise InvalidRequestError(f"{asked.name!r} is the bundle's own name; choose another.", param="name")
    entry = manifest.experts.get(asked.name)
    current = entry.generation if entry is not None and entry.state == "active" else None
    if asked.expected_generation is not None and asked.expected_generation != current:
        raise ConflictError(
            f"The expert {asked.name!r} is at generation {current}, not {asked.expected_generation}; "
            "look again and retry.",
            param="expected_generation",
        )
    if current is not None and asked.expected_generation is None and not asked.replace:
        raise ConflictError(
            f'The expert {asked.name!r} exists; send "replace": true, or choose another name.',
            param="name",
        )
    return current


def _check_prompts(prompts: Sequence[str], manifest: Manifest) -> None:
    if not prompts:
        return
    if not manifest.router.generation:
        raise InvalidRequestError(
            "This bundle has no router to profile for; leave 'prompts' out.", param="prompts"
        )
    if len(prompts) < MIN_PROMPTS:
        raise InvalidRequestError(
            f"prompts has {len(prompts)} items; the router needs at least {MIN_PROMPTS}.", param="prompts"
        )
