"""What an engine has made for a client that does not read it."""

import asyncio

from service.core import Failed, Finished, TextDelta, Usage
from service.errors import SlowClientError
from service.runtime.generation import Generation

END = Finished("cancelled", Usage(1, 1), None)


def test_events_beyond_the_backlog_end_the_request_in_an_error_and_are_not_kept() -> None:
    cancelled: list[int] = []

    async def run() -> list[object]:
        generation = Generation(asyncio.get_running_loop(), lambda: cancelled.append(1), "alice", backlog=3)
        for number in range(3):
            generation.deliver(TextDelta(str(number), (number,)))
        assert not cancelled
        for number in range(100):
            generation.deliver(TextDelta("more", (number,)))
        generation.deliver(END)
        return [event async for event in generation]

    [only] = asyncio.run(run())
    assert isinstance(only, Failed)
    assert isinstance(only.error, SlowClientError)
    assert "stream_backlog" in only.error.message
    assert cancelled == [1]


def test_a_reader_that_keeps_up_gets_everything() -> None:
    async def run() -> int:
        generation = Generation(asyncio.get_running_loop(), lambda: None, backlog=2)
        seen = 0
        for number in range(50):
            generation.deliver(TextDelta("a", (number,)))
            assert isinstance(await anext(generation), TextDelta)
            seen += 1
        generation.deliver(END)
        assert await anext(generation) is END
        return seen

    assert asyncio.run(run()) == 50
