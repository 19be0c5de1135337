"""Every metric of the server, in one object over an injected registry.

Names and buckets are vLLM's under `twinserve_`, so that its dashboards need a prefix and no more. The
engine hands over plain statistics once a step and once a request (`on_step`, `on_request`, from its own
thread); gauges are read when somebody scrapes. Labels are bounded: names of experts, models and keys beyond
the first `expert_labels` of each share the label `other`.

Drift: a router says what it was fitted to expect (`router_fitted_accuracy`, `router_fitted_abstention_ratio`), and
what real requests look like to it is counted beside: the mean of `router_confidence`, `router_abstentions` over
`routed_requests`, and the share of `router_distance` above 1, which is 5 % of prompts like those of its fit. Where
they part for long, the prompts have changed: register the experts again with prompts of today.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.core import EngineGauges, RequestStats, StepStats
from service.gen_ai import WELL, GenAiMetrics
from service.generation_metrics import GenerationMetrics
from service.registry_metrics import RegistryMetrics

_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_INTER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_ROUTER = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REWARD = (-1.0, -0.5, 0.0, 0.5, 1.0)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

_FINISHED = {"stop": "stop", "length": "length", "cancelled": "abort", "timeout": "timeout"}
"""`RequestStats.reason` → vLLM's finished_reason, and one of ours; everything else is "error"."""

OTHER = "other"


@dataclass(frozen=True, slots=True)
class _Read:
    """One figure, and how to read it from the snapshot."""

    name: str
    help: str
    read: Callable[[EngineGauges], float]


def _share(used: int, total: int) -> float:
    return used / total if total else 0.0


def _known(value: float | None) -> float:
    return math.nan if value is None else value


_GAUGES = (
    _Read("num_requests_running", "Sequences that hold KV blocks.", lambda g: g.running),
    _Read("num_requests_waiting", "Sequences that wait to be admitted.", lambda g: g.waiting),
    _Read(
        "kv_cache_usage_perc",
        "Share of the KV cache that running sequences hold; 1 is full.",
        lambda g: _share(g.kv_blocks_used, g.kv_blocks_total),
    ),
    _Read("kv_blocks_used", "KV blocks that running sequences hold.", lambda g: g.kv_blocks_used),
    _Read(
        "kv_blocks_cached",
        "KV blocks that hold prefixes for later and are given up when others need them.",
        lambda g: g.kv_blocks_cached,
    ),
    _Read("kv_blocks", "KV blocks in all.", lambda g: g.kv_blocks_total),
    _Read("experts_registered", "Experts that requests can name.", lambda g: g.experts_registered),
    _Read(
        "experts_resident",
        "Expert generations on the device, replaced ones with leases included.",
        lambda g: g.experts_resident,
    ),
    _Read(
        "experts_staged",
        "Generations in memory beside the current ones: tried out, or staged.",
        lambda g: g.experts_staged,
    ),
    _Read(
        "router_generation",
        "The current router; 0 without one.",
        lambda g: g.router.generation if g.router else 0,
    ),
    _Read(
        "router_fitted_accuracy",
        "Share of the held-out prompts of its fit that the router sent to their own expert; NaN where it is not "
        "known.",
        lambda g: _known(g.router.accuracy if g.router else None),
    ),
    _Read(
        "router_fitted_abstention_ratio",
        "Share of such prompts that it was to leave to the shared expert; NaN for a router that never does.",
        lambda g: _known(g.router.abstention if g.router else None),
    ),
    _Read(
        "router_distance_threshold",
        "The router_distance from which on it does; NaN for a router that never does.",
        lambda g: _known(g.router.threshold if g.router else None),
    ),
    _Read("merged_weight_bytes", "Materialised weights held.", lambda g: g.merged_bytes),
    _Read("engine_up", "1 while the engine thread lives.", lambda g: float(g.alive)),
)

_TOTALS = (
    _Read("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda g: g.prefix_queries),
    _Read("prefix_cache_hits", "Prompt tokens found there.", lambda g: g.prefix_hits),
    _Read("expert_loads", "Experts brought onto the device.", lambda g: g.expert_loads),
    _Read("expert_evictions", "Experts that lost their slot to others.", lambda g: g.expert_evictions),
    _Read("expert_slot_hits", "Experts of queued sequences that had a slot.", lambda g: g.expert_hits),
    _Read("expert_slot_misses", "Experts of queued sequences that had none.", lambda g: g.expert_misses),
)
"""Counters that the engine's parts keep themselves."""

Family = GaugeMetricFamily | CounterMetricFamily


class _Snapshot(Collector):
    """Reads the engine's gauges and totals once a scrape."""

    def __init__(self, read: Callable[[], EngineGauges]) -> None:
        self._read = read

    def describe(self) -> Iterable[Family]:
        """Names only: registering must not ask the engine."""
        return self._families(None)

    def collect(self) -> Iterator[Family]:
        """Current values."""
        return self._families(self._read())

    def _families(self, now: EngineGauges | None) -> Iterator[Family]:
        for gauge in _GAUGES:
            value = None if now is None else gauge.read(now)
            yield GaugeMetricFamily(f"twinserve_{gauge.name}", gauge.help, value=value)
        for total in _TOTALS:
            value = None if now is None else total.read(now)
            yield CounterMetricFamily(f"twinserve_{total.name}", total.help, value=value)


class Metrics:
    """Owns all metrics; safe to call from the engine's thread and the event loop.

    Args:
        registry: where they live; one `Metrics` a registry.
        expert_labels: names of experts, of models and of keys that get a label of their own.
    """

    def __init__(self, registry: CollectorRegistry, expert_labels: int = 64) -> None:
        self.registry = registry
        self._names_lock = threading.Lock()
        self._expert_labels = expert_labels
        self._expert_names: set[str] = set()
        self._key_ids: set[str] = set()
        self._models: set[str] = set()
        self._make_request_metrics()
        self._make_step_metrics()
        self._make_http_metrics()
        self._make_caller_metrics()
        self._gen_ai = GenAiMetrics(registry)
        self._generations = GenerationMetrics(registry, self._expert_label)
        self._make_classify_metrics()
        self._make_feedback_metrics()
        self.registrar = RegistryMetrics(registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"twinserve_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(f"twinserve_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _make_request_metrics(self) -> None:
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN
        )
        self._total = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for KV blocks.", _REQUEST)
        self._prefill = self._histogram("request_prefill_time_seconds", "Admission to first token.", _REQUEST)
        self._decode = self._histogram("request_decode_time_seconds", "First to last token.", _REQUEST)
        self._router = self._histogram("router_seconds", "A request's wait for its gates.", _ROUTER)
        self._finished = self._counter(
            "request_success", "Ended sequences: stop, length, abort, timeout or error.", ("finished_reason",)
        )
        for reason in (*_FINISHED.values(), "error"):
            self._finished.labels(reason)
        self._gate_mass = self._counter(
            "gate_weight_mass", "Absolute gate weight, summed over ended sequences.", ("expert",)
        )

    def _make_step_metrics(self) -> None:
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one sequence.", _INTER_TOKEN
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prefilled tokens.")
        self._generated_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._step_seconds = self._histogram("step_seconds", "One engine step.", _ROUTER, ("mode",))
        self._steps = self._counter("steps", "Engine steps.", ("mode",))
        for mode in ("shared", "factored", "merged"):
            self._steps.labels(mode)
        self._active = self._histogram("step_active_experts", "Experts in one step.", _COUNTS)
        self._patterns = self._histogram("step_patterns", "Routing patterns in one step.", _COUNTS)
        self._batch = self._histogram("step_decode_rows", "Sequences that decode in one step.", _COUNTS)
        self._rebuilds = self._counter("working_set_rebuilds", "Times the packed factors changed.")
        self._preemptions = self._counter(
            "num_preemptions", "Times that a sequence gave its KV blocks to others and began again."
        )
        self._routed = self._counter("routed_requests", "Sequences whose gates the router chose.")
        self._abstentions = self._counter(
            "router_abstentions", "Ended sequences that the router left to the shared expert."
        )
        self._route_step = self._histogram(
            "router_batch_seconds", "A step that carried prompts for the router.", _ROUTER
        )

    def _make_http_metrics(self) -> None:
        labels = ("method", "route", "status")
        self._http = self._counter("http_requests", "Answered HTTP requests.", labels)
        self._http_seconds = self._histogram(
            "http_request_seconds", "Until the last byte.", _FIRST_TOKEN, ("route",)
        )

    def _make_caller_metrics(self) -> None:
        self._key_requests = self._counter("key_requests", "HTTP requests of each API key's id.", ("key",))
        self._key_tokens = self._counter(
            "key_tokens", "Tokens of each API key's id: prompt or generated.", ("key", "kind")
        )
        self._rate_limited = self._counter(
            "rate_limited",
            "Requests that the limits of a caller refused: requests, tokens or concurrent.",
            ("limit",),
        )
        for limit in ("requests", "tokens", "concurrent"):
            self._rate_limited.labels(limit)
        self._cut = self._counter(
            "connections_refused",
            "Connections cut, or requests refused, before a route was asked: header, slow_header or stalled.",
            ("reason",),
        )
        for reason in ("header", "slow_header", "stalled"):
            self._cut.labels(reason)

    def _make_classify_metrics(self) -> None:
        self._classified = self._counter("classify_texts", "Classified texts: ok or error.", ("outcome",))
        for outcome in ("ok", "error"):
            self._classified.labels(outcome)
        self._classify_total = self._histogram(
            "classify_text_seconds", "A text's arrival to its label.", _FIRST_TOKEN
        )
        self._classify_pass = self._histogram(
            "classify_batch_seconds", "One batch, routed and labelled.", _ROUTER
        )
        self._classify_rows = self._histogram("classify_batch_texts", "Texts in one batch.", _COUNTS)
        self._classify_tokens = self._counter("classify_tokens", "Tokens of batches, padding included.")
        self._classify_routed = self._counter("classify_routed_texts", "Texts whose gates the router chose.")

    def _make_feedback_metrics(self) -> None:
        self._feedback = self._counter(
            "feedback",
            "Ratings: applied, frozen, unknown (forgotten, or its expert gone) or repeated.",
            ("result",),
        )
        for result in ("applied", "frozen", "unknown", "repeated"):
            self._feedback.labels(result)
        self._feedback_reward = self._histogram("feedback_reward", "Rewards of applied ratings.", _REWARD)
        self._explored = self._counter(
            "router_explored", "Answers by another expert than the best known one, to learn from feedback."
        )

    def watch(self, read: Callable[[], EngineGauges]) -> None:
        """Take the gauges from `read` at every scrape."""
        self.registry.register(_Snapshot(read))

    def on_step(self, stats: StepStats) -> None:
        """Record one engine step."""
        self._steps.labels(stats.mode).inc()
        self._step_seconds.labels(stats.mode).observe(stats.seconds)
        self._prompt_tokens.inc(stats.prefill_tokens)
        self._generated_tokens.inc(stats.generated_tokens)
        self._active.observe(stats.active_experts)
        self._patterns.observe(stats.patterns)
        self._batch.observe(stats.decode_rows)
        if stats.rebuilt:
            self._rebuilds.inc()
        self._preemptions.inc(stats.preemptions)
        for seconds in stats.inter_token_seconds:
            self._inter_token.observe(seconds)
        for route in stats.routes:
            self._generations.on_route(route)
        if stats.routed_requests:
            self._routed.inc(stats.routed_requests)
            self._route_step.observe(stats.route_seconds)

    def on_request(
        self, stats: RequestStats, *, operation: str = "text_completion", model: str = "", key: str = ""
    ) -> None:
        """Record one ended sequence.

        Args:
            stats: its times and counts.
            operation: in the words of OpenTelemetry's conventions.
            model: that was asked for.
            key: the id of the API key that asked.
        """
        error = "" if stats.reason in WELL else _FINISHED.get(stats.reason, "error")
        self._gen_ai.on_request(stats, operation, self._bounded(self._models, model) if model else "", error)
        if key:
            label = self._bounded(self._key_ids, key)
            self._key_tokens.labels(label, "prompt").inc(stats.prompt_tokens if stats.leads else 0)
            self._key_tokens.labels(label, "generated").inc(stats.completion_tokens)
        self._finished.labels(_FINISHED.get(stats.reason, "error")).inc()
        for histogram, seconds in (
            (self._queue, stats.queue_seconds),
            (self._router, stats.route_seconds),
            (self._prefill, stats.prefill_seconds),
            (self._decode, stats.decode_seconds),
            (self._first_token, stats.first_token_seconds),
            (self._total, stats.total_seconds),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        self._generations.on_request(stats, _FINISHED.get(stats.reason, "error"))
        self._abstentions.inc(stats.abstained)
        for name, weight in stats.gates.items():
            self._gate_mass.labels(self._expert_label(name)).inc(abs(weight))

    def on_rate_limited(self, limit: str) -> None:
        """Record one request that a caller's limit refused."""
        self._rate_limited.labels(limit).inc()

    def on_connection_refused(self, reason: str) -> None:
        """Record one connection that was cut, or whose request no route saw."""
        self._cut.labels(reason).inc()

    def on_classify_batch(self, *, texts: int, tokens: int, routed: int, seconds: float) -> None:
        """Record one batch of the classifier; `tokens` with padding."""
        self._classify_pass.observe(seconds)
        self._classify_rows.observe(texts)
        self._classify_tokens.inc(tokens)
        self._classify_routed.inc(routed)

    def on_classify_text(self, seconds: float, *, failed: bool) -> None:
        """Record one text of the classifier."""
        self._classified.labels("error" if failed else "ok").inc()
        self._classify_total.observe(seconds)

    def on_feedback(self, result: str, reward: float) -> None:
        """Record one rating."""
        self._feedback.labels(result).inc()
        if result == "applied":
            self._feedback_reward.observe(reward)

    def on_explored(self) -> None:
        """Record one answer that explored."""
        self._explored.inc()

    def on_http(self, method: str, route: str, status: int, seconds: float, key: str = "") -> None:
        """Record one answered HTTP request; `route` is the template, never the path, `key` the id of its key."""
        if key:
            self._key_requests.labels(self._bounded(self._key_ids, key)).inc()
        self._http.labels(method, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The scrape's body and its content type, in the format that `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _expert_label(self, name: str) -> str:
        return self._bounded(self._expert_names, name)

    def _bounded(self, known: set[str], name: str) -> str:
        """The label of a name: itself while there are few."""
        with self._names_lock:
            if name not in known:
                if len(known) >= self._expert_labels:
                    return OTHER
                known.add(name)
            return name
