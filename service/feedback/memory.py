"""Routed requests that can still be rated: bounded in number and age."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from experts.routing import Decision
from service.errors import AlreadyRatedError, RequestNotFoundError


@dataclass(slots=True)
class Routed:
    """One routed request.

    Attributes:
        client: whose it is; only that client can rate it.
        gates: what answered.
        at: monotonic seconds.
    """

    client: str
    decision: Decision
    gates: Mapping[str, float]
    at: float
    rated: bool = False


class Memory:
    """Routed requests by id, oldest first.

    Args:
        limit: requests kept; beyond it the oldest goes.
        seconds: for which one is kept.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._requests: OrderedDict[str, Routed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def put(self, request_id: str, routed: Routed) -> None:
        """Keep one that has ended."""
        self._expire(routed.at)
        self._requests[request_id] = routed
        self._requests.move_to_end(request_id)  # an id that came again is as new as any
        while len(self._requests) > self._limit:
            self._requests.popitem(last=False)

    def find(self, request_id: str, client: str, now: float) -> Routed:
        """One that can be rated.

        Raises:
            RequestNotFoundError: unknown, forgotten, not routed, or another client's: these look alike.
            AlreadyRatedError: it was rated before.
        """
        self._expire(now)
        routed = self._requests.get(request_id)
        if routed is None or routed.client != client:
            raise RequestNotFoundError(
                f"No routed answer {request_id[:128]!r} is remembered: only finished answers whose gates the router "
                f"chose can be rated, for {self._seconds:g} s (TWINSERVE_FEEDBACK_SECONDS). A router other than the "
                "MLP is watched for 64 prompts first, and what its guard left alone teaches nothing.",
                param="request_id",
            )
        if routed.rated:
            raise AlreadyRatedError(f"The answer {request_id[:128]!r} was rated before.", param="request_id")
        return routed

    def _expire(self, now: float) -> None:
        while self._requests:
            oldest = next(iter(self._requests))
            if now - self._requests[oldest].at <= self._seconds:
                return
            del self._requests[oldest]
