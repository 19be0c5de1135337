"""Registers and retires experts: one change at a time, first on disk, then live."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from experts.bundle import Bundle, ExpertWeights
from experts.bundle_manifest import check_name
from experts.errors import (
    BundleError,
    DuplicateExpertError,
    ExpertsError,
    GenerationConflictError,
    RoutingError,
    UnknownExpertError,
)
from experts.registry.refit import MIN_PROMPTS
from experts.routing import Router, prompt_forms, render_prompts
from service.core import ExpertStatus
from service.errors import (
    ConflictError,
    ExpertNotFoundError,
    ExpertRejectedError,
    InvalidRequestError,
    RequestFailedError,
)
from service.registrar.paths import confine
from service.registrar.worker import Job, RebuiltError, run

_log = logging.getLogger(__name__)


class LiveExperts(Protocol):
    """The runtime as the registrar sees it."""

    @property
    def tokenizer(self) -> Any:
        """The shared folder's tokenizer."""
        ...

    def experts(self) -> Sequence[ExpertStatus]:
        """Every generation in memory."""
        ...

    async def features(self, prompts: Sequence[tuple[int, ...]]) -> npt.NDArray[np.float32]:
        """What the router sees of each prompt, (n, d)."""
        ...

    async def publish(self, expert: ExpertWeights, router: Router | None) -> None:
        """Serve a generation from the next step on."""
        ...

    async def retire(self, name: str, router: Router | None) -> None:
        """Serve an expert no more; running requests keep it."""
        ...


@dataclass(frozen=True, slots=True)
class Registration:
    """What an administrator asks for; see `api.wire.admin.RegisterBody`."""

    name: str
    path: str
    size: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    expected_generation: int | None = None
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Registered:
    """A new generation, live; the report's totals as the worker gave them."""

    status: ExpertStatus
    report: Mapping[str, Any]


class Registrar:
    """Keeps the bundle on disk and the running experts in step.

    Args:
        live: the runtime.
        bundle: what it serves.
        root: the only folder to register from; None allows none.
    """

    def __init__(self, live: LiveExperts, bundle: Bundle, root: Path | None) -> None:
        self._live = live
        self._bundle = bundle
        self._root = root
        self._one_at_a_time = asyncio.Lock()

    def list(self) -> Sequence[ExpertStatus]:
        """Every generation in memory."""
        return self._live.experts()

    def get(self, name: str) -> ExpertStatus:
        """The active generation.

        Raises:
            ExpertNotFoundError: there is none of that name.
        """
        for status in self._live.experts():
            if status.name == name and status.state == "active":
                return status
        raise ExpertNotFoundError(f"There is no expert {name[:64]!r}; GET /admin/experts lists them.")

    async def register(self, asked: Registration) -> Registered:
        """Make an expert of a folder and serve it.

        Raises:
            PathNotAllowedError: the folder, or a link in it, is outside the root.
            InvalidRequestError: an impossible name, or prompts that cannot be profiled.
            ConflictError: the name is taken, or its generation is not the expected one.
            ExpertRejectedError: the checkpoint cannot become an expert; names the file or tensor.
        """
        async with self._one_at_a_time:
            expected = self._expected_generation(asked)
            self._check_prompts(asked.prompts)
            source = await asyncio.to_thread(confine, self._root, asked.path)
            job = Job(
                bundle=self._bundle.path,
                build_id=self._bundle.manifest.build_id,
                name=asked.name,
                source=source,
                size=asked.size,
                features=await self._features(asked.prompts) if asked.prompts else None,
                forms=len(prompt_forms(self._live.tokenizer)),
                expected_generation=expected,
            )
            try:
                report = await run(job)
            except (ExpertsError, RebuiltError) as error:
                raise _translated(error) from error
            await self._reopen()
            weights = await asyncio.to_thread(self._bundle.expert, asked.name)
            await self._live.publish(weights, await asyncio.to_thread(self._bundle.router))
            _log.info("expert %s is live at generation %d", asked.name, weights.generation)
            return Registered(self.get(asked.name), report)

    async def retire(self, name: str) -> ExpertStatus:
        """Take an expert out of service, on disk and live; running requests keep it.

        Raises:
            ExpertNotFoundError: there is none of that name.
        """
        async with self._one_at_a_time:
            status = self.get(name)
            try:
                self._bundle = await asyncio.to_thread(self._bundle.retire_expert, name)
            except ExpertsError as error:
                raise _translated(error) from error
            await self._live.retire(name, await asyncio.to_thread(self._bundle.router))
            _log.info("expert %s is retired", name)
            return replace(status, state="retired", routed=False)

    def _expected_generation(self, asked: Registration) -> int | None:
        """What the bundle must hold for this registration to go ahead: that generation, or nothing."""
        try:
            check_name(asked.name)
        except BundleError as error:
            raise InvalidRequestError(f"{error}.", param="name") from error
        if asked.name == self._bundle.manifest.name:
            raise InvalidRequestError(
                f"{asked.name!r} is the bundle's own name; choose another.", param="name"
            )
        entry = self._bundle.manifest.experts.get(asked.name)
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

    def _check_prompts(self, prompts: Sequence[str]) -> None:
        if not prompts:
            return
        if not self._bundle.manifest.router.generation:
            raise InvalidRequestError(
                "This bundle has no router to profile for; leave 'prompts' out.", param="prompts"
            )
        if len(prompts) < MIN_PROMPTS:
            raise InvalidRequestError(
                f"prompts has {len(prompts)} items; the router needs at least {MIN_PROMPTS}.", param="prompts"
            )

    async def _features(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(prompts × forms, d) of the running shared expert."""
        try:
            rendered = await asyncio.to_thread(render_prompts, self._live.tokenizer, prompts)
        except RoutingError as error:
            raise InvalidRequestError(f"prompts: {error}.", param="prompts") from error
        features = await self._live.features([tuple(ids) for ids in rendered])
        return np.ascontiguousarray(features, dtype=np.float32)

    async def _reopen(self) -> None:
        """See what the worker wrote."""
        reopened = await asyncio.to_thread(Bundle.open, self._bundle.path, False)
        if reopened.manifest.build_id != self._bundle.manifest.build_id:
            raise ConflictError(f"{self._bundle.path} was rebuilt while it was served; restart the server.")
        self._bundle = reopened


def _translated(error: Exception) -> Exception:
    """An error of the library as one that a client understands."""
    if isinstance(error, DuplicateExpertError | GenerationConflictError | UnknownExpertError | RebuiltError):
        return ConflictError(f"{error}.")
    if isinstance(error, BundleError):
        return RequestFailedError(f"The bundle on disk could not be updated: {error}.")
    return ExpertRejectedError(f"{error}.", param="path")
