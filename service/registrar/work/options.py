"""What the settings say of jobs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experts.registry.work import Limits, StoreAt
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class WorkOptions:
    """Limits and places of jobs.

    Attributes:
        folder: of half-made files; several servers may share it.
        store: where a worker process finds the blobs.
        limits: of a worker process.
        seconds: what one attempt may take.
        attempts: how often a job is begun whose process or server dies.
        warm: a process waits for the next job.
        keep_sources: fine-tunes that are kept as they came.
        keys: file of trusted keys; None takes unsigned sources.
        poll_seconds: how often it is looked whether a job waits.
    """

    folder: Path
    store: StoreAt
    limits: Limits = field(default_factory=Limits)
    seconds: float = 600.0
    attempts: int = 3
    warm: bool = True
    keep_sources: Literal["none", "lora", "all"] = "lora"
    keys: Path | None = None
    max_relative_error: float | None = None
    max_norm_ratio: float = 100.0
    poll_seconds: float = 0.2

    @classmethod
    def of(cls, settings: Settings, folder: Path, store: StoreAt) -> "WorkOptions":
        """As the settings say."""
        return cls(
            folder=folder,
            store=store,
            limits=Limits(settings.registration_threads, settings.registration_bytes),
            seconds=settings.registration_seconds,
            attempts=settings.registration_attempts,
            warm=settings.warm_worker,
            keep_sources=settings.keep_sources,
            keys=settings.signature_keys,
            max_relative_error=settings.max_relative_error,
            max_norm_ratio=settings.max_norm_ratio,
            poll_seconds=settings.registry_poll_seconds,
        )
