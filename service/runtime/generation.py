"""The event-loop side of one request."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from service.core import Event, Failed, Finished


class Generation(AsyncIterator[Event]):
    """The events of one request: text as it comes, then one `Finished` or `Failed`, then the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[], None], client: str = "") -> None:
        self.loop = loop
        self.client = client
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._arrival = asyncio.Event()
        self._over = False

    def cancel(self) -> None:
        """Stop generating soon; the terminal event still comes. Harmless when repeated or too late."""
        self._cancel()

    def deliver(self, event: Event) -> None:
        """On the event loop: hand over one event."""
        self._events.append(event)
        self._arrival.set()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        while not self._events:
            self._arrival.clear()
            await self._arrival.wait()
        event = self._events.popleft()
        self._over = isinstance(event, Finished | Failed)
        return event
