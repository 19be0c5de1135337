"""What a peer is: it takes token ids and gates, and says how long greedy answers of a fixed length took."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from types import TracebackType
from typing import Protocol, Self

from benchmarks.peers.family import ADAPTERS

_TRIPLES = random.Random(0).sample(list(permutations(ADAPTERS, 3)), 336)


class PeerUnavailableError(RuntimeError):
    """The peer cannot run here, and exactly why."""


class PeerResultError(RuntimeError):
    """The peer did other work than it was asked for, so its times mean nothing."""


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """One greedy request.

    Attributes:
        prompt_ids: the prompt.
        new_tokens: exactly so many tokens are generated, whatever they are.
        gates: adapter → weight; none at all is the base.
    """

    prompt_ids: tuple[int, ...]
    new_tokens: int
    gates: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PeerRun:
    """What one run took.

    Attributes:
        seconds: from the first request sent to the last answer whole.
        tokens: generated in all; verified against what was asked for.
        latencies: seconds of each request, in their order, from being sent to being whole.
        outputs: generated ids of each request, empty where the peer returns none.
    """

    seconds: float
    tokens: int
    latencies: tuple[float, ...]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_second(self) -> float:
        """Throughput of generated tokens."""
        return self.tokens / self.seconds


class Peer(Protocol):
    """A context manager: entering starts it, leaving stops it, so that no two share the cores.

    Entering raises `PeerUnavailableError` if it cannot run.
    """

    name: str

    def __enter__(self) -> Self:
        """Start."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and give all memory back."""

    def run(self, requests: Sequence[PeerRequest], clients: int) -> PeerRun:
        """Answer all requests with `clients` of them in flight."""


def only_adapter(request: PeerRequest) -> str:
    """The adapter of a request to a peer that knows no mixes.

    Raises:
        ValueError: not exactly one adapter with weight 1.
    """
    if len(request.gates) != 1 or set(request.gates.values()) != {1.0}:
        raise ValueError(f"this peer takes one adapter with weight 1, not {dict(request.gates)}")
    (name,) = request.gates
    return name


def one_adapter_each(index: int) -> Mapping[str, float]:
    """Gates of a request with one adapter of its own, in turn."""
    return {ADAPTERS[index % len(ADAPTERS)]: 1.0}


def same_adapter(_index: int) -> Mapping[str, float]:
    """Gates of requests that all use one adapter."""
    return {ADAPTERS[0]: 1.0}


def mix_of_three(index: int) -> Mapping[str, float]:
    """Gates of a request with a weighted mix of three adapters; 336 different ones, then again."""
    return dict(zip(_TRIPLES[index % len(_TRIPLES)], (0.5, 0.3, 0.2), strict=True))


def batch_lengths(requests: Sequence[PeerRequest]) -> tuple[int, int]:
    """(prompt, new) tokens of requests that go through as one tensor.

    Raises:
        ValueError: their lengths differ, so that padding would be measured too.
    """
    lengths = {(len(request.prompt_ids), request.new_tokens) for request in requests}
    if len(lengths) != 1:
        raise ValueError(f"the requests of a batch must be equally long, not {sorted(lengths)}")
    return lengths.pop()


def verified(
    seconds: float,
    latencies: Sequence[float],
    counts: Sequence[int],
    outputs: Sequence[Sequence[int]],
    requests: Sequence[PeerRequest],
) -> PeerRun:
    """The run, once every answer is known to be as long as was asked for.

    Args:
        counts: generated tokens of each answer.
        outputs: their ids, where the peer returns them.

    Raises:
        PeerResultError: an answer has another length.
    """
    for index, (count, request) in enumerate(zip(counts, requests, strict=True)):
        if count != request.new_tokens:
            raise PeerResultError(f"request {index} got {count} tokens instead of {request.new_tokens}")
    return PeerRun(seconds, sum(counts), tuple(latencies), tuple(tuple(output) for output in outputs))


def in_batches(
    ask: Callable[[Sequence[PeerRequest]], list[list[int]]], requests: Sequence[PeerRequest], clients: int
) -> PeerRun:
    """Batches of `clients` requests, one after another; a row is whole when its batch is.

    Args:
        ask: generates one batch; returns the token ids of every row.
    """
    outputs: list[list[int]] = []
    latencies: list[float] = []
    started = time.perf_counter()
    for first in range(0, len(requests), clients):
        batch = requests[first : first + clients]
        begun = time.perf_counter()
        outputs += ask(batch)
        latencies += [time.perf_counter() - begun] * len(batch)
    return verified(
        time.perf_counter() - started, latencies, [len(output) for output in outputs], outputs, requests
    )


def queued_latencies(finished: Sequence[float], clients: int) -> list[float]:
    """Latencies where `clients` clients wait for a server that takes one request after another.

    Args:
        finished: when each request was done, from the start; each client sends its next one at once.
    """
    sent = [0.0] * min(clients, len(finished)) + list(finished)
    return [end - begin for begin, end in zip(sent, finished, strict=False)]
