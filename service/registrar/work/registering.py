"""A registration: checked and computed by the worker, looked at on the engine, published; all of it or nothing."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experts.errors import StaleRouterError, TransitionError
from experts.registry.records import EXPERT_REPORT, Generation, Snapshot, Trial
from experts.registry.work import (
    EXPERT,
    SOURCE,
    Checks,
    FileEntry,
    Prepared,
    RegisterTask,
    RemoteSource,
    digest_of,
)
from service.core import ExpertKey
from service.registrar.checks import Registration
from service.registrar.sources import Sources
from service.registrar.work.canary import CanaryError, ask_all
from service.registrar.work.profile import profile
from service.registrar.work.routing import Taught, current, teach
from service.registrar.work.run import Run

PROFILE_FILE = "profile.safetensors"
PROMPTS_FILE = "prompts.json"


async def register(run: Run, sources: Sources) -> None:
    """Carry out a job of kind register.

    Raises:
        ExpertsError, TwinserveError: it cannot become an expert, or not now; nothing is live then.
        WorkerDiedError: the process ended.
    """
    job = run.job
    if job.name is None or job.generation is None:
        raise TransitionError(f"the job {job.id} names no generation to make")
    asked = Registration.read(job.request)
    await Registering(run, sources, asked, job.generation).carry_out()


class Registering:
    """One attempt of one registration."""

    def __init__(self, run: Run, sources: Sources, asked: Registration, number: int) -> None:
        self._run = run
        self._sources = sources
        self._asked = asked
        self._key = ExpertKey(asked.name, number)

    async def carry_out(self) -> None:
        """All stages, in order."""
        run, asked = self._run, self._asked
        snapshot = await current(run)
        # Beside the worker: what prompts look like to the router only the running engine can tell cheaply.
        seen = asyncio.create_task(self._profiled()) if asked.prompts else None
        try:
            source = await self._source()
            prepared = await run.worker.ask(self._task(snapshot, source), Prepared, run.gauge.follow)
            extra = await seen if seen is not None else {}
        finally:
            if seen is not None:
                seen.cancel()
        local = run.folder / SOURCE if isinstance(source, RemoteSource) else source
        run.report = dict(prepared.report)
        generation = self._generation(snapshot, prepared, extra)
        taught = await self._taught(local, extra)
        await run.store(self._files(prepared, local, extra) | dict(taught.files))
        report = await self._try_out(generation)
        generation = replace(generation, report={**generation.report, **report})
        while True:
            try:
                await self._publish(generation, taught)
                return
            except StaleRouterError:
                # Another router went live meanwhile: only that part is done again.
                taught = await self._taught(local, extra)
                await run.store(taught.files)

    async def _source(self) -> Path | RemoteSource:
        run, sources = self._run, self._sources
        if self._asked.url is not None:
            return RemoteSource(self._asked.url, sources.policy)
        return await run.ask(lambda: sources.resolve(run.job.request, run.folder))

    def _task(self, snapshot: Snapshot, source: Path | RemoteSource) -> RegisterTask:
        run, asked, options = self._run, self._asked, self._run.options
        others = {name: it for name, it in snapshot.experts.items() if name != asked.name}
        siblings = {name: it.summary for name, it in others.items() if it.summary is not None}
        untold = [name for name, summary in siblings.items() if summary.norm is None]
        return RegisterTask(
            bundle=run.served.bundle.path,
            build_id=snapshot.bundle.build_id,
            name=asked.name,
            source=source,
            foreign=asked.path is None,
            folder=run.folder,
            size=asked.size,
            checks=Checks(
                signature=asked.signature,
                keys=options.keys,
                max_relative_error=options.max_relative_error,
                max_norm_ratio=options.max_norm_ratio,
                siblings=siblings,
                reports={
                    name: others[name].files[EXPERT_REPORT]
                    for name in untold
                    if EXPERT_REPORT in others[name].files
                },
            ),
            keep=options.keep_sources,
        )

    async def _profiled(self) -> dict[str, FileEntry]:
        """Features of the prompts, and the prompts, as files of the attempt's folder."""
        run, prompts = self._run, self._asked.prompts
        features, texts = run.folder / PROFILE_FILE, run.folder / PROMPTS_FILE
        await profile(run.live, prompts, features, run.steady)
        await asyncio.to_thread(texts.write_text, json.dumps(list(prompts), ensure_ascii=False), "utf-8")
        return {it.name: await asyncio.to_thread(digest_of, it) for it in (features, texts)}

    def _generation(
        self, snapshot: Snapshot, prepared: Prepared, extra: Mapping[str, FileEntry]
    ) -> Generation:
        return Generation(
            name=self._key.name,
            number=self._key.generation,
            build_id=snapshot.bundle.build_id,
            state="ready",
            files=prepared.files,
            source=prepared.source,
            compression=prepared.compression,
            summary=prepared.summary,
            profile=extra.get(PROFILE_FILE),
            prompts=extra.get(PROMPTS_FILE),
            origin=prepared.origin,
            report=prepared.report,
            job=self._run.job.id,
        )

    async def _taught(self, source: Path, extra: Mapping[str, FileEntry]) -> Taught:
        key = self._key
        features = self._run.folder / PROFILE_FILE if PROFILE_FILE in extra else None
        return await teach(
            self._run, key.name, key.generation, f"registered {key}", source=source, profile=features
        )

    def _files(
        self, prepared: Prepared, source: Path, extra: Mapping[str, FileEntry]
    ) -> dict[Path, FileEntry]:
        folder = self._run.folder
        return {
            **{folder / EXPERT / name: entry for name, entry in prepared.files.items()},
            **{folder / name: entry for name, entry in extra.items()},
            **{source / name: entry for name, entry in prepared.origin.items()},
        }

    async def _try_out(self, generation: Generation) -> dict[str, Any]:
        """Have the engine take it, and ask it what it must know."""
        run, asked = self._run, self._asked
        run.gauge.at("try")
        weights = await run.ask(lambda: run.served.reader.expert(generation))
        try:
            with run.steady():
                await run.stage(weights)
                if not asked.canaries:
                    return {}
                run.gauge.at("try", 0.3)
                answers = await ask_all(run.live, self._key, asked.canaries, asked.canary_min_score)
        except CanaryError as error:
            run.report["canaries"] = error.report
            raise
        return {"canaries": answers}

    async def _publish(self, generation: Generation, taught: Taught) -> None:
        run, asked, job = self._run, self._asked, self._run.job
        run.gauge.at("publish")
        trial = None
        if asked.trial is not None:
            trial = Trial(asked.name, generation.number, asked.trial.kind, asked.trial.percent)
        result = {
            "name": generation.name,
            "generation": generation.number,
            "router": taught.routed.by,
            "report": dict(generation.report),
        }
        await run.publish(
            lambda: run.catalogue.publish(
                job.id,
                job.attempt,
                generation,
                taught.router,
                taught.fitted_on,
                activate=asked.activate,
                trial=trial,
                result=result,
            )
        )
