"""What one caller may use: requests and tokens in a minute, and requests at once.

A caller is an API key; on an open server it is an address, an IPv6 one with its whole /64. Requests are counted when
they come, in a sliding minute. Tokens are known only when a sequence has ended: they are charged then, in a minute
that begins with the first of them, and a caller that has used its minute up waits for the next. Only methods that can
cause work are limited, not GET, HEAD and OPTIONS.
"""

import asyncio
import contextlib
import ipaddress
import math
import time
from collections import Counter
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Caller
from service.api.errors import error_response
from service.core import RequestStats
from service.errors import RateLimitedError
from service.keys import KeyLimits
from service.metrics import Metrics
from service.record import RequestRecord, current

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_PREFIX = "X-RateLimit"


@dataclass(slots=True)
class _Window:
    """One limit of a minute."""

    what: str
    limiter: RateLimiter

    async def standing(self, amount: int, payer: str) -> tuple[int, float]:
        """What is left of it, and in how many seconds it is more."""
        stats = await self.limiter.get_window_stats(RateLimitItemPerMinute(amount), self.what, payer)
        return stats.remaining, max(0.0, stats.reset_time - time.time())


class LimitCallers:
    """Refuses a caller that has used up what it may use, and tells each what it has left.

    Args:
        default: of every caller whose key says nothing else.
    """

    def __init__(self, app: ASGIApp, default: KeyLimits, metrics: Metrics) -> None:
        self._app = app
        self._default = default
        self._metrics = metrics
        storage = MemoryStorage()
        self._requests = _Window("requests", SlidingWindowCounterRateLimiter(storage))
        # Unlike a sliding one it also takes what goes beyond the limit.
        self._tokens = _Window("tokens", FixedWindowRateLimiter(storage))
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        caller = scope.get("state", {}).get("caller")
        if (
            scope["type"] != "http"
            or scope["method"] in SAFE_METHODS
            or not isinstance(caller, Caller)
            or not caller.metered
        ):
            await self._app(scope, receive, send)
            return
        own, default = caller.limits, self._default
        limits = KeyLimits(
            requests=own.requests or default.requests,
            tokens=own.tokens or default.tokens,
            concurrent=own.concurrent or default.concurrent,
        )
        if limits == KeyLimits():
            await self._app(scope, receive, send)
            return
        await self._limited(limits, caller.id or _address(scope), scope, receive, send)

    async def _limited(
        self, limits: KeyLimits, payer: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        headers: dict[str, str] = {}

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        if limits.concurrent is not None and self._running[payer] >= limits.concurrent:
            error = self._refused("concurrent", f"{limits.concurrent} requests at once (max_concurrent)", 1.0)
            await error_response(error)(scope, receive, told)
            return
        self._running[payer] += 1
        try:
            try:
                await self._charge_request(limits, payer, headers)
            except RateLimitedError as error:
                await error_response(error)(scope, receive, told)
                return
            record = current()
            if limits.tokens is not None and record is not None:
                self._charge_tokens(record, limits.tokens, payer)
            await self._app(scope, receive, told)
        finally:
            self._running[payer] -= 1
            if not self._running[payer]:
                del self._running[payer]

    async def _charge_request(self, limits: KeyLimits, payer: str, headers: dict[str, str]) -> None:
        """Count the request, and write what is left into `headers`.

        Raises:
            RateLimitedError: nothing is left.
        """
        refused: RateLimitedError | None = None
        if limits.tokens is not None:
            left, reset = await self._tokens.standing(limits.tokens, payer)
            _tell(headers, "tokens", limits.tokens, left, reset)
            if left == 0:
                what = f"{limits.tokens} tokens a minute (tokens_per_minute)"
                refused = self._refused("tokens", what, reset)
        if limits.requests is not None:
            item = RateLimitItemPerMinute(limits.requests)
            counted = refused is None and await self._requests.limiter.hit(item, "requests", payer)
            left, reset = await self._requests.standing(limits.requests, payer)
            _tell(headers, "requests", limits.requests, left, reset)
            if refused is None and not counted:
                what = f"{limits.requests} requests a minute (requests_per_minute)"
                refused = self._refused("requests", what, reset)
        if refused is not None:
            raise refused

    def _charge_tokens(self, record: RequestRecord, amount: int, payer: str) -> None:
        """Have the tokens of its sequences charged as each ends, whether the client has waited for it or not."""
        loop = asyncio.get_running_loop()
        item = RateLimitItemPerMinute(amount)
        charging: set[asyncio.Task[bool]] = set()

        def charge(tokens: int) -> None:
            task = loop.create_task(self._tokens.limiter.hit(item, "tokens", payer, cost=tokens))
            charging.add(task)
            task.add_done_callback(charging.discard)

        def ended(stats: RequestStats) -> None:
            tokens = stats.completion_tokens + (stats.prompt_tokens if stats.leads else 0)
            with contextlib.suppress(RuntimeError):  # the loop is closed: so is the server
                loop.call_soon_threadsafe(charge, tokens)

        record.on_ended.append(ended)

    def _refused(self, limit: str, what: str, reset: float) -> RateLimitedError:
        self._metrics.on_rate_limited(limit)
        return RateLimitedError(
            f"The limit is {what} for one key or address; try again in {max(1, math.ceil(reset))} s.",
            retry_after=reset,
        )


def _tell(headers: dict[str, str], what: str, limit: int, left: int, reset: float) -> None:
    headers[f"{_PREFIX}-Limit-{what}"] = str(limit)
    headers[f"{_PREFIX}-Remaining-{what}"] = str(left)
    headers[f"{_PREFIX}-Reset-{what}"] = f"{math.ceil(reset * 1000) / 1000:g}s"


def _address(scope: Scope) -> str:
    client = scope.get("client")
    if client is None:
        return "address"
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return f"address {client[0]}"
    if address.version == 6:
        return f"address {ipaddress.ip_network((int(address), 64), strict=False)}"
    return f"address {address}"
