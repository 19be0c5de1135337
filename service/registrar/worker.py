"""The heavy half of a registration, in a process of its own: the engine must not wait for a decomposition.

The process lives for one job, so that its memory goes back and a crash leaves nothing behind. What it
writes to disk is `Bundle.publish_expert`'s, which is atomic.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from experts.bundle import Bundle
from experts.errors import ExpertsError
from experts.registry import (
    describe_source,
    join_by_weights,
    known_by_prompts,
    prepare_expert,
    refit_router,
)
from service.errors import RequestFailedError

_log = logging.getLogger(__name__)

_NICENESS = 10
"""The engine's threads go first."""

_KILL_SECONDS = 10
"""A killed process ends at once, unless it waits for a disk that does not answer."""


@dataclass(frozen=True, slots=True)
class Job:
    """One registration, checked and ready to compute.

    Attributes:
        bundle: folder of the bundle.
        build_id: of the bundle that is being served; another one on disk has another shared expert.
        source: folder of the fine-tune.
        size: `rank` or `energy`, or nothing for the bundle's own compression.
        features: (prompts × forms, d) float32 for the router; None leaves what it knows of the expert as it is,
            and lets a new one join by its weights where the router can.
        forms: consecutive rows that one prompt made.
        expected_generation: of the expert to replace; None for a new name.
    """

    bundle: Path
    build_id: str
    name: str
    source: Path
    size: Mapping[str, Any]
    features: npt.NDArray[np.float32] | None
    forms: int
    expected_generation: int | None


class RebuiltError(Exception):
    """The bundle on disk is not the one being served."""


def perform(job: Job) -> dict[str, Any]:
    """Compute, compress and publish on disk; returns totals of the compression report.

    Raises:
        ExpertsError: as `prepare_expert`, `refit_router` and `Bundle.publish_expert`.
        RebuiltError: the bundle was rebuilt under the server.
    """
    bundle = Bundle.open(job.bundle, verify=False)
    if bundle.manifest.build_id != job.build_id:
        raise RebuiltError(f"{job.bundle} was rebuilt since the server opened it; restart the server")
    spec = bundle.manifest.compression
    if job.size:
        spec = spec.resized(**job.size)
    # Prompts come to this process as features only, so activations cannot weigh what is lost.
    spec = spec.model_copy(update={"allocation": "energy"})
    compressed = prepare_expert(bundle, job.name, job.source, spec)
    if job.features is None:
        kept = known_by_prompts(bundle, job.name)
        router = None if kept else join_by_weights(bundle, job.name, job.source)
    else:
        router = refit_router(bundle, job.name, torch.from_numpy(job.features), forms=job.forms, replace=True)
    bundle.publish_expert(
        compressed, job.name, router, job.expected_generation, describe_source(job.source), spec
    )
    report = compressed.report
    handled = [tensor.handling for tensor in report.tensors]
    return {
        "bytes": report.nbytes,
        "fraction_of_full": report.fraction,
        "relative_error": report.relative_error,
        "kept_relative_error": report.kept_relative_error,
        "folded_fraction": report.folded_fraction,
        "max_rank": report.max_rank,
        "tensors": {handling: handled.count(handling) for handling in ("factored", "exact", "folded")},
    }


def _main(job: Job, results: Connection) -> None:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends us
    os.nice(_NICENESS)
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    try:
        results.send(perform(job))
    except (ExpertsError, RebuiltError) as error:
        results.send(error)


async def run(job: Job) -> dict[str, Any]:
    """`perform` in another process, which is killed if this is cancelled.

    What a killed process leaves on the disk is an old manifest or a new one, never a half.

    Raises:
        ExpertsError, RebuiltError: as `perform`.
        RequestFailedError: the process died: out of memory, or a fault of ours that its traceback tells.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(job, theirs), name=f"register-{job.name}", daemon=True)
    work = asyncio.get_running_loop().run_in_executor(None, _carry_out, process, ours, theirs)
    try:
        result = await asyncio.shield(work)
    finally:
        await _end(process, work)
    if result is None:
        raise RequestFailedError(
            f"The process that computed {job.name!r} died (exit code {process.exitcode}); "
            "the server's log tells more. Is there memory enough?"
        )
    if isinstance(result, Exception):
        raise result
    return dict(result)


def _carry_out(
    process: SpawnProcess, ours: Connection, theirs: Connection
) -> dict[str, Any] | Exception | None:
    """Start the process and wait for its result; None if it dies without one. Blocks."""
    with ours:
        with theirs:
            process.start()
        # The child's end is the last one now: its death is our end of file.
        try:
            received: dict[str, Any] | Exception | None = ours.recv()
        except EOFError:
            received = None
        process.join()
    return received


async def _end(process: SpawnProcess, work: "asyncio.Future[Any]") -> None:
    """Kill the process if it still works, and wait until nothing is left of it."""
    deadline = time.monotonic() + _KILL_SECONDS
    while not work.done() and time.monotonic() < deadline:
        with contextlib.suppress(AttributeError):  # it is only being started
            process.kill()
        await asyncio.wait({work}, timeout=0.1)
    if not work.done():
        _log.error("%s (process %s) does not end; it hangs in the kernel", process.name, process.pid)
