"""Run jobs, in this process or in several side by side, and keep every cell as it is done.

Workers only answer: the process that started them owns the store's file. Jobs come in stages (a stage begins when the
one before it is done) and in units (the jobs of a unit run in one process, one after another, and share its merges).
"""

import multiprocessing
import queue
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experts.errors import EvaluationError
from experts.evaluation.bench import Bench
from experts.evaluation.jobs import Job, run_job
from experts.evaluation.setting import Setting
from experts.evaluation.store import Cell, Store, key_of

Unit = tuple[Job, ...]
Report = Callable[[Cell | None, int], None]
"""Gets each new cell, or None when a unit ended, with the items that the unit may have cost."""

_PATIENCE = 2.0
"""Seconds between looks at whether the workers live."""


def run_stages(
    stages: Sequence[Sequence[Unit]],
    settings: Mapping[str, Setting],
    store: Store,
    workers: int,
    report: Report,
) -> None:
    """Run every unit of every stage.

    Raises:
        EvaluationError: a job failed or a worker died; what was measured is kept.
    """
    digests = {name: setting.digests() for name, setting in settings.items()}
    for stage in stages:
        units = sorted(stage, key=lambda unit: unit[0].setting)
        if workers <= 1:
            _run_here(units, settings, digests, store, report)
        elif units:
            _run_beside(units, settings, digests, store, min(workers, len(units)), report)


class Benches:
    """Opens the bench of a setting when it is asked for, and closes the one before."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._settings = settings
        self._open: dict[str, Bench] = {}

    def of(self, name: str) -> Bench:
        """The bench of a setting."""
        if name not in self._open:
            self._open.clear()
            self._open[name] = Bench(self._settings[name])
        return self._open[name]


def _run_here(
    units: Sequence[Unit],
    settings: Mapping[str, Setting],
    digests: Mapping[str, Mapping[str, str]],
    store: Store,
    report: Report,
) -> None:
    benches = Benches(settings)

    def emit(cell: Cell) -> None:
        store.put(cell)
        report(cell, 0)

    for unit in units:
        for job in unit:
            run_job(job, benches.of(job.setting), store.get, emit, digests[job.setting])
        report(None, sum(job.cost for job in unit))


def _run_beside(
    units: Sequence[Unit],
    settings: Mapping[str, Setting],
    digests: Mapping[str, Mapping[str, str]],
    store: Store,
    workers: int,
    report: Report,
) -> None:
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    done: Any = context.Queue()
    for unit in units:
        todo.put(unit)
    arguments = (todo, done, settings, digests, store.path)
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    for process in processes:
        todo.put(None)
        process.start()
    try:
        left = len(units)
        while left:
            for kind, value in _messages(done, processes):
                if kind == "cell":
                    store.put(value)
                    report(value, 0)
                elif kind == "unit":
                    left -= 1
                    report(None, value)
                else:
                    raise EvaluationError(f"a worker failed; what was measured is kept.\n{value}")
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _messages(done: Any, processes: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The next message, if one comes in time.

    Raises:
        EvaluationError: every worker is gone.
    """
    try:
        yield done.get(timeout=_PATIENCE)
    except queue.Empty:
        if not any(process.is_alive() for process in processes):
            codes = [process.exitcode for process in processes]
            raise EvaluationError(
                f"the workers ended with {codes} before their work was done; was memory short? "
                "Start the same command again, with fewer workers"
            ) from None


def _work(
    todo: Any,
    done: Any,
    settings: Mapping[str, Setting],
    digests: Mapping[str, Mapping[str, str]],
    path: Path,
) -> None:
    """A worker's life: units until there are none, on one thread."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    store, benches = Store(path), Benches(settings)
    while (unit := todo.get()) is not None:
        try:
            store.refresh()
            own: dict[str, Cell] = {}
            for job in unit:

                def lookup(wanted: Mapping[str, Any], own: dict[str, Cell] = own) -> Cell | None:
                    return own.get(key_of(wanted)) or store.get(wanted)

                def emit(cell: Cell, own: dict[str, Cell] = own) -> None:
                    own[key_of(cell.parameters)] = cell
                    done.put(("cell", cell))

                run_job(job, benches.of(job.setting), lookup, emit, digests[job.setting])
            done.put(("unit", sum(job.cost for job in unit)))
        except Exception:  # noqa: BLE001 - told to the process that waits
            done.put(("failed", traceback.format_exc()))
            return
