"""Registers and retires experts: one change at a time, first on disk, then live."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experts.bundle import Bundle
from experts.errors import (
    BundleError,
    DuplicateExpertError,
    ExpertsError,
    GenerationConflictError,
    RoutingError,
    UnknownExpertError,
)
from experts.routing import Router, among, prompt_forms, render_prompts
from service.core import ExpertStatus
from service.errors import (
    ConflictError,
    ExpertNotFoundError,
    ExpertRejectedError,
    InvalidRequestError,
    QueueFullError,
    RegistrationTimeoutError,
    RequestFailedError,
)
from service.registrar.checks import Registration, check_registration
from service.registrar.live import LiveExperts
from service.registrar.paths import confine
from service.registrar.worker import Job, RebuiltError, run

_log = logging.getLogger(__name__)

_LOST = (DuplicateExpertError, GenerationConflictError, UnknownExpertError, RebuiltError)
"""Somebody else changed the bundle first: nothing of ours is on the disk, and theirs must stay."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A new generation, live; the report's totals as the worker gave them."""

    status: ExpertStatus
    report: Mapping[str, Any]


class Registrar:
    """Keeps the bundle on disk and the running experts in step.

    Args:
        live: the runtime.
        bundle: what it serves. It may hold experts that the runtime could not take; those are replaced or
            retired like any other, but listed nowhere.
        root: the only folder to register from; None allows none.
        seconds: what one registration may take, from its turn on until it goes live.
        limit: registrations and retirements that run or wait.
    """

    def __init__(
        self,
        live: LiveExperts,
        bundle: Bundle,
        root: Path | None,
        *,
        seconds: float = 600.0,
        limit: int = 8,
    ) -> None:
        self._live = live
        self._bundle = bundle
        self._root = root
        self._seconds = seconds
        self._limit = limit
        self._pending = 0
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
        """Make an expert of a folder and serve it. If it raises, nothing is registered, on disk or live.

        Raises:
            PathNotAllowedError: the folder, or a link in it, is outside the root.
            InvalidRequestError: an impossible name, or prompts that cannot be profiled.
            ConflictError: the name is taken, or its generation is not the expected one.
            ExpertRejectedError: the checkpoint cannot become an expert, or the model cannot serve it; names
                the file or tensor.
            QueueFullError: too many registrations wait already.
            RegistrationTimeoutError: it took too long.
        """
        async with self._turn():
            before = self._bundle
            expected = check_registration(asked, before.manifest)
            try:
                report = await self._in_time(asked, expected)
                await self._reopen()
                await self._go_live(asked.name)
            except _LOST as error:
                raise _translated(error) from error
            except Exception as error:
                await self._take_back(asked.name, before)
                raise _translated(error) from error
            status = self.get(asked.name)
            _log.info("expert %s is live at generation %d", asked.name, status.generation)
            return Registered(status, report)

    async def retire(self, name: str) -> ExpertStatus:
        """Take an expert out of service, on disk and live; running requests keep it.

        One that is only on disk, or only live, goes too.

        Raises:
            ExpertNotFoundError: there is none of that name.
            QueueFullError: too many changes wait already.
        """
        async with self._turn():
            status = self._known(name)
            if name in self._bundle.expert_names():
                try:
                    self._bundle = await asyncio.to_thread(self._bundle.retire_expert, name)
                except ExpertsError as error:
                    raise _translated(error) from error
            if name in self._live_names():
                await self._live.retire(name, await self._router(self._live_names() - {name}))
            _log.info("expert %s is retired", name)
            return replace(status, state="retired", routed=False)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One change at a time, and few that wait; begins with the bundle as it is on disk.

        Raises:
            QueueFullError: too many wait already.
            RequestFailedError, ConflictError: the bundle on disk cannot be read, or is another one.
        """
        if self._pending >= self._limit:
            raise QueueFullError(
                f"{self._pending} registrations are running or waiting, the limit is {self._limit} "
                "(TWINSERVE_MAX_REGISTRATIONS); try again later.",
                retry_after=10,
            )
        self._pending += 1
        try:
            async with self._one_at_a_time:
                try:
                    await self._reopen()
                except (ExpertsError, RebuiltError) as error:
                    raise _translated(error) from error
                yield
        finally:
            self._pending -= 1

    async def _in_time(self, asked: Registration, expected: int | None) -> Mapping[str, Any]:
        """Compute and publish on disk, within the deadline."""
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                return await self._compute(asked, expected)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise RegistrationTimeoutError(
                f"The registration of {asked.name!r} took longer than {self._seconds:g} s "
                "(TWINSERVE_REGISTRATION_SECONDS) and was stopped; nothing was registered."
            ) from error

    async def _compute(self, asked: Registration, expected: int | None) -> Mapping[str, Any]:
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
        return await run(job)

    async def _go_live(self, name: str) -> None:
        """Serve what is on disk now."""
        weights = await asyncio.to_thread(self._bundle.expert, name)
        await self._live.publish(weights, await self._router(self._live_names() | {name}))

    async def _take_back(self, name: str, before: Bundle) -> None:
        """Undo on disk what the registration may have published, so that disk and runtime agree again."""
        try:
            self._bundle = await asyncio.to_thread(before.revert_expert, name)
        except ExpertsError as error:
            _log.error("expert %s was not registered, but stays in the bundle: %s; DELETE it", name, error)

    async def _router(self, served: set[str]) -> Router | None:
        """The bundle's router, choosing among experts that are served."""
        return among(await asyncio.to_thread(self._bundle.router), served)

    def _live_names(self) -> set[str]:
        return {status.name for status in self._live.experts() if status.state == "active"}

    def _known(self, name: str) -> ExpertStatus:
        """The expert as it is served, or as the bundle alone knows it.

        Raises:
            ExpertNotFoundError: neither has it.
        """
        entry = self._bundle.manifest.experts.get(name)
        if name in self._live_names() or entry is None or entry.state != "active":
            return self.get(name)
        return ExpertStatus(
            name=name,
            generation=entry.generation,
            state="active",
            routed=False,
            leases=0,
            nbytes=0,
            max_rank=entry.summary.rank_max,
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
        """See the bundle as it is on disk."""
        reopened = await asyncio.to_thread(Bundle.open, self._bundle.path, False)
        if reopened.manifest.build_id != self._bundle.manifest.build_id:
            raise RebuiltError(f"{self._bundle.path} was rebuilt while it was served; restart the server")
        self._bundle = reopened


def _translated(error: Exception) -> Exception:
    """An error of the library as one that a client understands; any other as it is."""
    if isinstance(error, _LOST):
        return ConflictError(f"{error}.")
    if isinstance(error, BundleError):
        return RequestFailedError(f"The bundle on disk could not be read or updated: {error}.")
    if isinstance(error, ExpertsError):
        return ExpertRejectedError(f"{error}.", param="path")
    return error
