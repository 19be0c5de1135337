"""A backend by construction: says what it is told to say. For the HTTP edge alone; no model, no thread."""

import asyncio
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from service.core import (
    Constraint,
    EngineGauges,
    Event,
    ExpertStatus,
    Finished,
    GenerationRequest,
    RoutingChoice,
    RoutingOutcome,
    TextDelta,
    Usage,
)
from service.errors import EngineDeadError

OUTCOME = RoutingOutcome(gates={"alpha": 1.0}, pattern="alpha@1:1", mode="factored", generations={"alpha": 1})
END = Finished("stop", Usage(prompt_tokens=3, completion_tokens=2), OUTCOME)


@dataclass
class Letters:
    """One token a character: `a` is 97, `d` is 0."""

    chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    special_tokens_map: dict[str, str] = field(default_factory=dict)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) % 100 for character in text]

    added_tokens_decoder: dict[int, Any] = field(default_factory=dict)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(token if token >= 32 else token + 100) for token in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.decode([token])


@dataclass
class Script:
    """Events of one sequence; a number waits that many seconds, an exception is raised."""

    items: Sequence[Event | float | Exception]
    cancelled: bool = False
    position: int = 0

    def __aiter__(self) -> "Script":
        return self

    async def __anext__(self) -> Event:
        while self.position < len(self.items):
            item = self.items[self.position]
            self.position += 1
            if isinstance(item, float):
                await asyncio.sleep(item)
            elif isinstance(item, Exception):
                raise item
            else:
                return item
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


def gauges(**known: Any) -> EngineGauges:
    """Nothing but what is said."""
    fields = dataclasses.fields(EngineGauges)
    return EngineGauges(**{**{one.name: 0 for one in fields}, "alive": True, **known})


def says(*texts: str) -> list[Event | float | Exception]:
    return [*(TextDelta(text, (1,)) for text in texts), END]


@dataclass
class ScriptedNames:
    """Aliases, and what becomes of a name that is waited for; stands where the registrar does.

    Attributes:
        arriving: called with the names that are waited for; may raise.
        awaited: the names of every wait.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    arriving: Callable[[Collection[str]], None] = lambda _: None
    awaited: list[list[str]] = field(default_factory=list)
    sources: Any = field(default_factory=lambda: SimpleNamespace(uploads=None))

    def resolve(self, model: str) -> str:
        return self.aliases.get(model, model)

    def served_aliases(self) -> Mapping[str, str]:
        return self.aliases

    async def ready_for(self, names: Collection[str]) -> None:
        self.awaited.append(list(names))
        self.arriving(names)


@dataclass
class ScriptedBackend:
    """`answer` makes the script of each request; what was submitted stays in `scripts`."""

    answer: Callable[[GenerationRequest], Sequence[Event | float | Exception]] = lambda _: says("a", "b")
    tokenizer: Any = field(default_factory=Letters)
    vocab_size: int = 100
    state_size: int = 8
    max_context: int = 64
    bundle_name: str = "family"
    alive: bool = True
    ready: bool = True
    statuses: Sequence[ExpertStatus] = (ExpertStatus("alpha", 1, "active", True, 0, 10, 4),)
    requests: list[GenerationRequest] = field(default_factory=list)
    scripts: list[Script] = field(default_factory=list)

    def submit(self, request: GenerationRequest) -> Script:
        if not self.alive:
            raise EngineDeadError("the engine has stopped; restart the server")
        script = Script(self.answer(request))
        self.requests.append(request)
        self.scripts.append(script)
        return script

    async def route(
        self, prompts: Sequence[tuple[int, ...]], choice: RoutingChoice
    ) -> Sequence[RoutingOutcome]:
        return [OUTCOME] * len(prompts)

    async def compile(self, constraint: Constraint) -> object:
        return constraint

    def router_names(self) -> Sequence[str]:
        return ("mlp",)

    def expert_names(self) -> frozenset[str]:
        return frozenset(status.name for status in self.experts() if status.state == "active")

    def experts(self) -> Sequence[ExpertStatus]:
        return self.statuses

    def gauges(self) -> EngineGauges:
        return gauges(alive=self.alive)
