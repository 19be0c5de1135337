"""The event-loop side of one request."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from service.core import Event, Failed, Finished
from service.errors import SlowClientError


class Generation(AsyncIterator[Event]):
    """The events of one request: text as it comes, then one `Finished` or `Failed`, then the end.

    Args:
        loop: whoever reads the events runs there.
        cancel: asks the engine to stop.
        client: whose request it is.
        backlog: events that may wait to be read; with more the request is cancelled, and its end is an error.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        cancel: Callable[[], None],
        client: str = "",
        backlog: int = 1024,
    ) -> None:
        self.loop = loop
        self.client = client
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._arrival = asyncio.Event()
        self._over = False
        self._backlog = backlog
        self._given_up = False

    def cancel(self) -> None:
        """Stop generating soon; the terminal event still comes. Harmless when repeated or too late."""
        self._cancel()

    def deliver(self, event: Event) -> None:
        """On the event loop: hand over one event."""
        if self._given_up:
            return
        if len(self._events) >= self._backlog:
            self._given_up = True
            self._events.clear()
            self._cancel()
            event = Failed(
                SlowClientError(
                    f"{self._backlog} events wait to be read (stream_backlog): the client is too slow; read the "
                    "stream as it comes, or ask for the answer whole"
                )
            )
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
