"""Metrics of the registry: what this replica serves of it, how jobs end, what its siblings are behind."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_JOB_SECONDS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LOAD_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_KINDS = ("register", "reprofile", "rebuild")
_STATES = ("succeeded", "failed", "cancelled")


class RegistryMetrics:
    """Safe to call from any thread.

    Args:
        registry: where they live.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._revision = Gauge(
            "twinserve_registry_revision",
            "The catalogue's revision: served by this replica, and known to it.",
            ("kind",),
            registry=registry,
        )
        self._up = Gauge(
            "twinserve_registry_up", "1 while the catalogue answers this replica.", registry=registry
        )
        self._broken = Gauge(
            "twinserve_registry_broken_experts",
            "Generations that this replica should serve and cannot load.",
            registry=registry,
        )
        self._loads = Counter(
            "twinserve_registry_loads",
            "Generations of new revisions that were loaded: ok or error.",
            ("outcome",),
            registry=registry,
        )
        self._load_seconds = Histogram(
            "twinserve_registry_load_seconds",
            "One generation from the blob store onto the device.",
            buckets=_LOAD_SECONDS,
            registry=registry,
        )
        self._jobs = Counter(
            "twinserve_registry_jobs",
            "Jobs that ended on this replica, by kind and end.",
            ("kind", "state"),
            registry=registry,
        )
        self._job_seconds = Histogram(
            "twinserve_registry_job_seconds",
            "A job that succeeded, from its claim to its end.",
            ("kind",),
            buckets=_JOB_SECONDS,
            registry=registry,
        )
        self._replicas = Gauge(
            "twinserve_registry_replicas", "Replicas that report themselves.", registry=registry
        )
        self._lag = Gauge(
            "twinserve_registry_replica_lag",
            "Revisions that a replica is behind the foremost one.",
            ("replica",),
            registry=registry,
        )
        self._collected = Counter(
            "twinserve_registry_collected",
            "What garbage collection on this replica removed: generations or blobs.",
            ("kind",),
            registry=registry,
        )
        self._collected_bytes = Counter(
            "twinserve_registry_collected_bytes", "Bytes of blobs that it removed.", registry=registry
        )
        for kind in _KINDS:
            self._job_seconds.labels(kind)
            for state in _STATES:
                self._jobs.labels(kind, state)
        for outcome in ("ok", "error"):
            self._loads.labels(outcome)
        for kind in ("generations", "blobs"):
            self._collected.labels(kind)

    def on_revision(self, served: int, known: int) -> None:
        """Set what is served and what is known."""
        self._revision.labels("served").set(served)
        self._revision.labels("known").set(known)

    def on_reachable(self, *, up: bool) -> None:
        """Set whether the catalogue answers."""
        self._up.set(up)

    def on_broken(self, experts: int) -> None:
        """Set how many generations cannot be loaded."""
        self._broken.set(experts)

    def on_load(self, seconds: float, *, failed: bool) -> None:
        """Record one generation that was loaded, or could not be."""
        self._loads.labels("error" if failed else "ok").inc()
        if not failed:
            self._load_seconds.observe(seconds)

    def on_job(self, kind: str, state: str, seconds: float | None) -> None:
        """Record one job that ended here."""
        self._jobs.labels(kind, state).inc()
        if state == "succeeded" and seconds is not None:
            self._job_seconds.labels(kind).observe(seconds)

    def on_replicas(self, lags: Mapping[str, int]) -> None:
        """Set the live replicas, and what each is behind."""
        self._replicas.set(len(lags))
        self._lag.clear()
        for replica, lag in lags.items():
            self._lag.labels(replica).set(lag)

    def on_collected(self, generations: int, blobs: int, nbytes: int) -> None:
        """Record one garbage collection."""
        self._collected.labels("generations").inc(generations)
        self._collected.labels("blobs").inc(blobs)
        self._collected_bytes.inc(nbytes)
