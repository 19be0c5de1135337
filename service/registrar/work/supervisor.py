"""Runs the registry's jobs on this replica: claims one, has it done by the worker process, and settles how it ended.

Whatever dies, the catalogue decides: a job that its owner lost is begun anew by whoever claims it next, and what the
loser still reports counts for nothing.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

from experts.errors import BlobError, CatalogueError, ExpertsError, JobLostError
from experts.registry.catalogue import Catalogue
from experts.registry.records import ENDED, Job, JobFailure
from experts.registry.work import Scratch, Setup
from service.errors import RegistrationTimeoutError, TwinserveError
from service.registrar.calls import Calls
from service.registrar.lasting import lasting
from service.registrar.sources import Sources
from service.registrar.work.failures import failure_of
from service.registrar.work.gauge import Gauge
from service.registrar.work.live import Stage
from service.registrar.work.options import WorkOptions
from service.registrar.work.process import WorkerDiedError, Workers
from service.registrar.work.profile import Backgrounds
from service.registrar.work.rebuilding import rebuild
from service.registrar.work.registering import register
from service.registrar.work.reprofiling import reprofile
from service.registrar.work.run import Run
from service.registrar.work.served import Served, steady

_log = logging.getLogger(__name__)

T = TypeVar("T")

_TELL_SECONDS = 0.25
"""Between two reports of progress, which also ask whether the job shall stop."""

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
"""Between two questions to a database that does not answer."""

Ended = Callable[[str, str, float | None], None]
"""(kind, state, seconds since it was claimed) of a job that ended here."""


class Supervisor:
    """One replica's share of the jobs.

    Args:
        catalogue: says what is to be done, and takes what was.
        live: the running engine.
        served: the family that it serves now.
        sources: where fine-tunes come from.
        options: limits and places.
        replica: this process's id.
        calls: threads for what blocks.
        follow: returns when this replica serves what the catalogue says, or after a while.
        ended: told of every job that ended here.

    Attributes:
        problem: that a fault keeps jobs from running here for the moment; empty while all is well.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        live: Stage,
        served: Callable[[], Served],
        sources: Sources,
        options: WorkOptions,
        replica: str,
        *,
        calls: Calls,
        follow: Callable[[], Awaitable[None]],
        ended: Ended,
    ) -> None:
        self._catalogue = catalogue
        self._live = live
        self._served = served
        self._sources = sources
        self._options = options
        self._replica = replica
        self._calls = calls
        self._follow = follow
        self._ended = ended
        self.problem = ""
        self._refused = ""
        self._woken = asyncio.Event()
        self._workers = Workers(self._setup, warm=options.warm)
        self._backgrounds = Backgrounds(options.folder)

    def wake(self) -> None:
        """Look now: a job was submitted, or cancelled."""
        self._woken.set()

    @property
    def waiting_process(self) -> int | None:
        """The id of the process that waits for the next job; None while there is none, or it works."""
        return self._workers.pid

    async def run(self) -> None:
        """Carry jobs out until cancelled; the one that runs then is given up where it stands.

        A fault of ours ends neither this nor the job at hand: it is given back, as one whose process died.
        """
        await lasting(self._carry_on, self._recover, what="the registry's supervisor")

    async def _recover(self) -> None:
        self.problem = (
            "The registry's supervisor failed by a fault, which the server's log tells; it begins anew."
        )
        await self._give_back(self._options.attempts)

    async def _carry_on(self) -> None:
        """Job after job."""
        opening, scratch = await self._open_scratch()
        ahead = asyncio.create_task(self._prepare())
        try:
            while True:
                job = await self._claim()
                if job is not None:
                    await self._carry_out(job, scratch)
                    await self._workers.warm_up()
                self.problem = ""
                if job is None:
                    await self._rest(self._options.poll_seconds)
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)
            await self._workers.close()
            await asyncio.to_thread(opening.__exit__, None, None, None)

    async def _open_scratch(self) -> tuple[AbstractContextManager[Scratch], Scratch]:
        """The folder for half-made files. A disk that refuses is asked again: jobs are taken in, and wait for it."""
        told = ""
        while True:
            opening = Scratch.opened(self._options.folder)
            try:
                return opening, await self._calls(opening.__enter__)
            except BlobError as error:
                if str(error) != told:
                    _log.error("no job can run on this replica: %s", error)
                told = str(error)
            await asyncio.sleep(_LONGEST_PAUSE_SECONDS)

    async def _claim(self) -> Job | None:
        """The next job, if it is our turn. Whose engine has ended could only fail it: others shall have it."""
        if not self._live.alive:
            return None
        try:
            job = await self._calls(lambda: self._catalogue.claim(self._replica))
        except CatalogueError as error:
            if str(error) != self._refused:
                _log.warning("the catalogue cannot be asked for jobs: %s", error)
            self._refused = str(error)
            # Whether we got one nobody can tell now; once it answers again, we have none, and began none.
            await self._give_back(None)
            return None
        self._refused = ""
        return job

    async def _give_back(
        self,
        attempts: int | None,
        failure: JobFailure | None = None,
        report: Mapping[str, object] | None = None,
    ) -> list[Job]:
        """Have what this replica claimed begun anew, as `Catalogue.requeue`."""
        return await self._insist(
            lambda: self._catalogue.requeue(self._replica, attempts, failure=failure, report=report)
        )

    async def _prepare(self) -> None:
        """What the first registration would have to wait for otherwise."""
        await self._workers.warm_up()
        if not self._options.warm:
            return
        served = self._served()
        with contextlib.suppress(TwinserveError, ExpertsError, OSError):
            snapshot = await self._insist(self._catalogue.snapshot)
            if snapshot is not None and snapshot.router is not None:
                found = snapshot.router
                router = await self._insist(lambda: served.reader.router(found))
                build_id = snapshot.bundle.build_id
                own = functools.partial(steady, self._served, build_id)
                await self._backgrounds.of(self._live, router, build_id, own)

    def _setup(self) -> Setup:
        return Setup(self._served().bundle.path, self._options.store, self._options.limits)

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()

    # -- one job ------------------------------------------------------------------------------------

    async def _carry_out(self, job: Job, scratch: Scratch) -> None:
        began = time.monotonic()
        attempt = _Attempt(job, await self._seconds_for(job))
        _log.info("job %s (%s %s) begins, attempt %d", job.id, job.kind, job.name or "", job.attempt)
        work = asyncio.create_task(self._work(attempt, scratch))
        try:
            why = await self._watch(attempt, work, began + attempt.seconds)
        except BaseException:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            raise
        state = await self._settle(attempt, work, why)
        if state is not None:
            seconds = time.monotonic() - began
            _log.info("job %s has %s after %.2f s", job.id, state, seconds)
            self._ended(job.kind, state, seconds)

    async def _seconds_for(self, job: Job) -> float:
        """What an attempt may take. A rebuild compresses every expert anew, and has as long for each of them."""
        if job.kind != "rebuild":
            return self._options.seconds
        snapshot = await self._insist(self._catalogue.snapshot)
        return self._options.seconds * max(len(snapshot.experts) if snapshot is not None else 0, 1)

    async def _work(self, attempt: "_Attempt", scratch: Scratch) -> None:
        """The whole attempt, to its publication; whatever happens, nothing of it stays but what went live."""
        job = attempt.job
        try:
            served = await self._caught_up()
            async with self._workers.one() as worker:
                folder = await self._calls(lambda: scratch.folder(job.id))
                run = attempt.run = Run(
                    job,
                    catalogue=self._catalogue,
                    live=self._live,
                    served=served,
                    now=self._served,
                    worker=worker,
                    folder=folder,
                    options=self._options,
                    backgrounds=self._backgrounds,
                    gauge=attempt.gauge,
                    ask=self._insist,
                )
                try:
                    await self._perform(run)
                    # What is staged is what goes live: it is withdrawn when it has.
                    await self._follow()
                finally:
                    await run.clean_up()
        finally:
            await asyncio.to_thread(scratch.remove, job.id)

    async def _caught_up(self) -> Served:
        """What is served here, once it is the catalogue's bundle: a replica takes a while to switch to another."""
        while True:
            served = self._served()
            snapshot = await self._insist(self._catalogue.snapshot)
            if snapshot is None or snapshot.bundle.build_id == served.bundle.manifest.build_id:
                return served
            await self._follow()

    async def _perform(self, run: Run) -> None:
        match run.job.kind:
            case "register":
                await register(run, self._sources)
            case "reprofile":
                await reprofile(run)
            case "rebuild":
                await rebuild(run, self._sources)

    async def _watch(self, attempt: "_Attempt", work: "asyncio.Task[None]", deadline: float) -> str | None:
        """Report progress until the work has ended; why it was stopped: cancelled, lost or late."""
        job = attempt.job
        while not work.done():
            await self._until_told(work)
            if work.done():
                break
            why = None
            try:
                tell = functools.partial(self._catalogue.progress, job.id, job.attempt, attempt.gauge.now())
                if await self._calls(tell):
                    why = "cancelled"
            except JobLostError:
                why = "lost"
            except (CatalogueError, TimeoutError) as error:
                _log.debug("progress of job %s is not told: %s", job.id, error)
            if time.monotonic() > deadline:
                why = why or "late"
            if why is not None and not attempt.decided and not work.done():
                work.cancel()
                await asyncio.wait({work})
                return why
        return None

    async def _until_told(self, work: "asyncio.Task[None]") -> None:
        waker = asyncio.create_task(self._woken.wait())
        try:
            await asyncio.wait({work, waker}, timeout=_TELL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waker.cancel()
        self._woken.clear()

    async def _settle(self, attempt: "_Attempt", work: "asyncio.Task[None]", why: str | None) -> str | None:
        """Tell the catalogue how it ended; the job's state, None where it is not ours to tell."""
        job = attempt.job
        error = None if work.cancelled() else work.exception()
        if error is None and not work.cancelled():
            return "succeeded"
        try:
            if why == "cancelled":
                await self._insist(lambda: self._catalogue.cancelled(job.id, job.attempt))
                return "cancelled"
            if why == "lost" or isinstance(error, JobLostError):
                _log.warning("job %s is not ours any more; its attempt %d is dropped", job.id, job.attempt)
                return None
            failure = self._failure(attempt, error)
            report = {**attempt.report, "error": {"code": failure.code, "message": failure.message}}
            if isinstance(error, WorkerDiedError):
                _log.warning("job %s: %s", job.id, error)
                given = await self._give_back(self._options.attempts, failure, report)
                return next((it.state for it in given if it.id == job.id and it.state in ENDED), None)
            await self._insist(lambda: self._catalogue.fail(job.id, job.attempt, failure, report))
        except ExpertsError as refused:
            _log.warning("job %s has ended otherwise: %s", job.id, refused)
            return None
        return "failed"

    def _failure(self, attempt: "_Attempt", error: BaseException | None) -> JobFailure:
        job = attempt.job
        what = f"the expert {job.name!r}" if job.name else "the bundle"
        if error is None:
            late = RegistrationTimeoutError(
                f"The registration of {what} took longer than {attempt.seconds:g} s "
                f"(TWINSERVE_REGISTRATION_SECONDS), in stage {attempt.gauge.stage!r}, and was stopped; nothing "
                "was registered."
            )
            return JobFailure(late.code, late.message)
        if isinstance(error, WorkerDiedError):
            code = "none" if error.code is None else str(error.code)
            return JobFailure(
                "request_failed",
                f"The process that computed {what} died {self._options.attempts} time(s), last in stage "
                f"{attempt.gauge.stage!r} with exit code {code}; the server's log tells more. Is there memory "
                "enough? Nothing was registered.",
            )
        if not isinstance(error, (ExpertsError, TwinserveError)):
            _log.error("job %s failed by a fault", job.id, exc_info=error)
        else:
            _log.info("job %s: %s: %s", job.id, type(error).__name__, error)
        assert isinstance(error, Exception)
        return failure_of(job, error)

    async def _insist(self, call: Callable[[], T]) -> T:
        """What a call returns or raises; while the catalogue does not answer, it is asked again."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self._calls(call)
            except CatalogueError as error:
                if pause == _FIRST_PAUSE_SECONDS:
                    _log.warning("the catalogue does not answer a job: %s", error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


class _Attempt:
    """What is known of an attempt from outside it, before and after it has begun."""

    def __init__(self, job: Job, seconds: float) -> None:
        self.job = job
        self.seconds = seconds
        self.gauge = Gauge(job.progress.percent)
        self.run: Run | None = None

    @property
    def decided(self) -> bool:
        return self.run is not None and self.run.decided

    @property
    def report(self) -> dict[str, object]:
        return self.run.report if self.run is not None else {}
