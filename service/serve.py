"""Puts the server together and runs it: registry, runtime, metrics, app, uvicorn; drains on SIGTERM."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from transformers.utils.logging import disable_progress_bar

from experts.errors import BundleError
from experts.routing import BanditSpec, Router
from service.api.app import create_app
from service.api.naming import SHARED
from service.api.protocol import ConnectionLimits, guarded_protocol
from service.classify import Classifier, open_classifier
from service.engine.assembly import EngineOptions
from service.engine.model import ModelOptions
from service.engine.routing import RoutingDefaults
from service.feedback import Feedback, FeedbackOptions, open_feedback
from service.grammar import GrammarOptions
from service.metrics import Metrics
from service.registrar import CatalogueFamily, RunningRegistry, open_registry
from service.runtime import Runtime, RuntimeConfig, RuntimeSwitch, open_runtime
from service.scheduler.policy import Budget, Limits, Policy
from service.settings import Settings
from service.telemetry import StatsRelay, open_tracing

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

_log = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 75
"""Longer than usual proxies and client pools wait, so that they close idle connections, not we under them."""

_LONGEST_CONTEXT = 4096
"""Tokens of one sequence where no setting says; the model's own limit if that is less."""

_POLL_SECONDS = 0.02

_LAST_WORDS_SECONDS = 5
"""After the drain's own deadline, for the last events to reach their clients."""


def runtime_config(settings: Settings) -> RuntimeConfig:
    """The runtime's part of the settings."""
    model = ModelOptions(
        kv_bytes=settings.kv_cache_bytes,
        max_tokens=settings.max_context or _LONGEST_CONTEXT,
        chunk_tokens=max(settings.prefill_step, settings.prefill_chunk),
        pack_base=settings.pack_base,
        native=settings.native,
        native_cache=settings.native_cache,
        int8=settings.shared_weights == "int8",
    )
    policy = Policy(
        max_wait_seconds=settings.max_wait_seconds,
        max_active_experts=settings.max_active_experts,
        fair_share=settings.fair_share,
    )
    return RuntimeConfig(
        engine=EngineOptions(
            model=model,
            limits=Limits(max_running=settings.max_batch),
            budget=Budget(step_tokens=settings.prefill_step, chunk_tokens=settings.prefill_chunk),
            policy=policy,
            routing=RoutingDefaults(top_k=settings.router_top_k, threshold=settings.router_threshold),
            prefix_cache=settings.prefix_cache,
            mode=settings.mix_mode,
            merged_bytes=settings.merged_bytes,
            single_pass=settings.single_pass,
            host_cache_bytes=settings.host_cache_bytes,
        ),
        max_queue=settings.max_queue,
        backlog=settings.stream_backlog,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        max_experts=settings.max_experts,
        max_expert_bytes=settings.max_expert_bytes,
        pinned_experts=settings.pinned_experts,
        grammars=GrammarOptions(
            max_bytes=settings.max_grammar_bytes,
            max_seconds=settings.max_grammar_seconds,
            remembered=settings.grammar_cache,
        ),
    )


class DrainingServer(uvicorn.Server):
    """uvicorn that says where it listens, and lets running requests end before it does.

    Args:
        runtime: refuses new requests as soon as the shutdown begins.
        registry: begins with the server, and ends when the shutdown begins.
        drain_seconds: what running requests may still take; then they end with an error.
        announce: gets the URL once connections are accepted.
        classifier: closed when the last connection is.
        tracing: the same.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        runtime: RuntimeSwitch,
        registry: RunningRegistry,
        drain_seconds: float,
        announce: Callable[[str], None],
        classifier: Classifier | None = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        super().__init__(config)
        self._tracing = tracing
        self._classifier = classifier
        self._runtime = runtime
        self._registry = registry
        self._drain_seconds = drain_seconds
        self._announce = announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed is not raised again: a drained server exits with 0."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            url = _url(self.servers[0].sockets[0].getsockname())
            self._registry.start(url)
            self._announce(url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse, drain, close.

        Connections are accepted until the last request has ended: whoever comes meanwhile is told to go elsewhere.
        """
        _log.info("draining for up to %g s", self._drain_seconds)
        drain = asyncio.create_task(self._runtime.drain(self._drain_seconds))
        deadline = time.monotonic() + self._drain_seconds
        for connection in list(self.server_state.connections):
            connection.shutdown()  # the idle ones; the others when they have answered
        # One turn, so that the runtime refuses before anything else is taken in.
        await asyncio.sleep(0)
        leaving = asyncio.create_task(self._registry.stop())
        while not drain.done() or (self.server_state.tasks and time.monotonic() < deadline):
            if self.force_exit:
                break
            await asyncio.sleep(_POLL_SECONDS)
        await super().shutdown(sockets)
        await drain
        await leaving
        await asyncio.to_thread(self._registry.close)
        if self._classifier is not None:
            self._classifier.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def _url(address: tuple[str, int]) -> str:
    host, port = address[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 compared, not bound
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def serve(settings: Settings, announce: Callable[[str, RuntimeSwitch], None]) -> None:
    """Serve until SIGTERM or SIGINT. Blocks.

    Args:
        settings: everything.
        announce: gets the URL and the runtime once connections are accepted.

    Raises:
        ExpertsError: the bundle is missing or broken.
        TwinserveError: its model cannot be served.
        ValueError: the settings name keys or packages that cannot be used.
    """
    server, runtime = assemble(settings, announce)
    try:
        server.run()
    finally:
        runtime.close()


def assemble(
    settings: Settings, announce: Callable[[str, RuntimeSwitch], None]
) -> tuple[DrainingServer, RuntimeSwitch]:
    """A server that is ready to run, and the runtime under it, which is the caller's to close.

    Raises:
        ExpertsError, TwinserveError, ValueError: as `serve`.
    """
    metrics = _metrics()
    disable_progress_bar()  # type: ignore[no-untyped-call]  # logs are lines
    tracing = open_tracing(settings)
    with contextlib.ExitStack() as undo:
        registry = open_registry(settings)
        undo.callback(registry.close)
        relay = StatsRelay(metrics)

        def open_family(family: CatalogueFamily) -> Runtime:
            return open_runtime(family, runtime_config(settings), relay)

        runtime = RuntimeSwitch(open_family(registry.family))
        undo.callback(runtime.close)
        metrics.watch(runtime.gauges)
        running = RunningRegistry(
            settings,
            registry,
            runtime,
            lambda family: runtime.swap(lambda: open_family(family)),
            metrics.registrar,
        )
        feedback = _feedback(settings, registry.family.router(), runtime, metrics)
        classifier = _classifier(settings, runtime, metrics)
        app = create_app(runtime, settings, metrics, running.registrar, classifier, feedback, tracing)
        server = _server(settings, app, runtime, running, metrics, announce, classifier, tracing)
        undo.pop_all()
    return server, runtime


def _server(
    settings: Settings,
    app: FastAPI,
    runtime: RuntimeSwitch,
    running: RunningRegistry,
    metrics: Metrics,
    announce: Callable[[str, RuntimeSwitch], None],
    classifier: Classifier | None,
    tracing: "Tracing | None",
) -> DrainingServer:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
        http=guarded_protocol(_connection_limits(settings), metrics.on_connection_refused),
        ws="none",
    )
    return DrainingServer(
        config,
        runtime,
        running,
        settings.drain_seconds,
        lambda url: announce(url, runtime),
        classifier,
        tracing,
    )


def _connection_limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        max_url_bytes=settings.max_url_bytes,
        max_header_bytes=settings.max_header_bytes,
        max_headers=settings.max_headers,
        header_seconds=settings.header_seconds,
        stall_seconds=settings.stall_seconds,
    )


def _feedback(
    settings: Settings, router: Router | None, runtime: RuntimeSwitch, metrics: Metrics
) -> Feedback | None:
    """The feedback of the settings, at work in the runtime."""
    if not settings.feedback:
        return None
    options = FeedbackOptions(
        BanditSpec(epsilon=settings.feedback_epsilon, cap=settings.feedback_cap),
        folder=settings.feedback_dir,
        remembered=settings.feedback_requests,
        seconds=settings.feedback_seconds,
        snapshot_every=settings.feedback_snapshot_every,
    )
    try:
        feedback = open_feedback(options, router, metrics)
    except OSError as error:
        raise ValueError(f"TWINSERVE_FEEDBACK_DIR: cannot use {settings.feedback_dir}: {error}") from error
    runtime.use_feedback(feedback)
    return feedback


def _classifier(settings: Settings, runtime: RuntimeSwitch, metrics: Metrics) -> Classifier | None:
    """The classifier of the settings."""
    if settings.classifier is None:
        return None
    opened = open_classifier(
        settings.classifier,
        metrics,
        device=settings.device,
        max_queue=settings.max_queue,
        max_batch=settings.max_batch,
        max_text_tokens=settings.max_prompt_tokens,
        threads=settings.threads,
    )
    if opened.name in (runtime.bundle_name, SHARED, *(status.name for status in runtime.experts())):
        opened.close()
        raise BundleError(
            f"{settings.classifier}: its name {opened.name!r} is a model of {settings.bundle} too; build it "
            "under another name"
        )
    return opened


def _metrics() -> Metrics:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return Metrics(registry)
