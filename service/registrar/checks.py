"""What a registration must be before any work is done for it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from experts.bundle import check_name
from experts.errors import BundleError
from experts.registry import MIN_PROMPTS
from experts.registry.records import Actor, TrialKind
from service.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt that a new generation must answer as expected before it may serve."""

    prompt: str
    expected: str
    match: Literal["exact", "contains"] = "exact"


@dataclass(frozen=True, slots=True)
class TrialAsked:
    """Try the new generation out on `percent` of routed requests, in (0, 100], instead of switching to it."""

    kind: TrialKind
    percent: float


@dataclass(frozen=True, slots=True)
class ChangeAsked:
    """Who asks for a change of an expert, and on top of what.

    Attributes:
        expected: the generation that must be the current one; None does not care.
        precondition: `expected` comes from `If-Match`.
    """

    actor: Actor
    expected: int | None = None
    precondition: bool = False


@dataclass(frozen=True, slots=True)
class Registration:
    """What an administrator asks for; see `api.wire.admin.RegisterBody`.

    Attributes:
        path, upload, url: where the fine-tune is; exactly one: a folder below the experts' root, an upload's id,
            or a URL.
        files: what the blob store holds of an upload, file name → digest and size; `Sources.admit` fills it in.
        size: `rank` or `energy`, or nothing for the bundle's own compression.
        canary_min_score: share of the canaries that must come out as expected, 0 to 1.
        precondition: the expected generation comes from `If-Match`.
        activate: the generation serves as soon as it is ready.
        signature: base64 of a detached Ed25519 signature.
    """

    name: str
    path: str | None = None
    upload: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    url: str | None = None
    size: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    canaries: tuple[Canary, ...] = ()
    canary_min_score: float = 1.0
    expected_generation: int | None = None
    precondition: bool = False
    replace: bool = False
    activate: bool = True
    trial: TrialAsked | None = None
    signature: str | None = None

    def request(self) -> dict[str, Any]:
        """As JSON, for the catalogue; `read` is its inverse."""
        return {key: value for key, value in asdict(self).items() if value not in (None, (), {})}

    @classmethod
    def read(cls, request: Mapping[str, Any]) -> "Registration":
        """What a job was asked for; what was added when its source was admitted is left out."""
        known = {each.name for each in fields(cls)}
        values = {key: value for key, value in request.items() if key in known}
        values["prompts"] = tuple(values.get("prompts", ()))
        values["canaries"] = tuple(Canary(**canary) for canary in values.get("canaries", ()))
        if values.get("trial"):
            values["trial"] = TrialAsked(**values["trial"])
        return cls(**values)


def check_registration(asked: Registration, bundle_name: str, *, routed: bool) -> None:
    """Refuse what no catalogue needs to be asked about.

    Args:
        asked: the registration.
        bundle_name: the served bundle's name, which no expert may have.
        routed: the bundle has a router, that prompts can be profiled for.

    Raises:
        InvalidRequestError: an impossible name, not exactly one source, or prompts that cannot be profiled.
    """
    try:
        check_name(asked.name)
    except BundleError as error:
        raise InvalidRequestError(f"{error}.", param="name") from error
    if asked.name == bundle_name:
        raise InvalidRequestError(f"{asked.name!r} is the bundle's own name; choose another.", param="name")
    given = [source for source in ("path", "upload", "url") if getattr(asked, source) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"Send exactly one of 'path', 'upload' and 'url'; {', '.join(given) or 'none'} was sent.",
            param=given[1] if given else "path",
        )
    _check_prompts(asked.prompts, routed)


def _check_prompts(prompts: Sequence[str], routed: bool) -> None:
    if not prompts:
        return
    if not routed:
        raise InvalidRequestError(
            "This bundle has no router to profile for; leave 'prompts' out.", param="prompts"
        )
    if len(prompts) < MIN_PROMPTS:
        raise InvalidRequestError(
            f"prompts has {len(prompts)} items; the router needs at least {MIN_PROMPTS}.", param="prompts"
        )
