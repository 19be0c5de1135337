"""Constraints compiled once, on threads of their own, and remembered."""

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from transformers import PreTrainedTokenizerBase

from service.core import Constraint
from service.errors import LimitExceededError, QueueFullError, ShuttingDownError
from service.grammar.bounds import check_bytes
from service.grammar.faults import DefinitionError, shortened
from service.grammar.grammar import Grammar
from service.grammar.options import GrammarOptions
from service.grammar.vocabulary import Vocabulary

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 2
_WAITING = 64
"""Constraints that run or wait to be compiled."""

_STACK_BYTES = 256 * 2**20
"""Of a compiling thread, for definitions as deep as `bounds.MAX_DEPTH`; only what is used takes memory."""

Compiled = Grammar | DefinitionError


class Grammars:
    """Compiled constraints of one served model. `get` may be awaited on any event loop.

    Args:
        tokenizer: as the bundle's folder has it.
        size: of the model's vocabulary.
        ends: its end-of-sequence tokens.
        options: bounds.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int], options: GrammarOptions
    ) -> None:
        self._vocabulary = Vocabulary(tokenizer, size, ends)
        self._options = options
        self._pool = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._running: dict[Constraint, Future[Compiled]] = {}
        self._known: OrderedDict[Constraint, Compiled] = OrderedDict()
        self.compiled = 0

    async def get(self, constraint: Constraint) -> Grammar:
        """The constraint's grammar. Whoever asks for the same meanwhile waits for the same work.

        Raises:
            InvalidRequestError: it cannot be compiled; names the field.
            LimitExceededError: it is beyond a bound.
            QueueFullError, ShuttingDownError: too many others are ahead, or nothing is compiled any more.
        """
        try:
            check_bytes(constraint.text, self._options.max_bytes)
        except DefinitionError as fault:
            raise fault.about(constraint.param) from fault
        found = self._known_or_begun(constraint)
        if isinstance(found, Future):
            found = await self._made(constraint, found)
        if isinstance(found, DefinitionError):
            raise found.about(constraint.param)
        return found

    def prepare(self) -> None:
        """Begin to read the tokenizer, so that the first constraint need not wait for it."""
        self._submit(self._read)

    def close(self, *, wait: bool = False) -> None:
        """Take no more work; what runs ends by the library's own bounds.

        Args:
            wait: until that is the case.
        """
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _known_or_begun(self, constraint: Constraint) -> Compiled | Future[Compiled]:
        """What is remembered, or the work that makes it, which whoever asks first begins."""
        with self._lock:
            found = self._known.get(constraint)
            if found is not None and not (isinstance(found, Grammar) and found.worn):
                self._known.move_to_end(constraint)
                return found
            work = self._running.get(constraint)
            if work is not None:
                return work
            if len(self._running) >= _WAITING:
                raise QueueFullError(
                    f"{_WAITING} constraints wait to be compiled; try again later", retry_after=1.0
                )
            return self._running.setdefault(constraint, self._submit(self._compile, constraint))

    async def _made(self, constraint: Constraint, work: Future[Compiled]) -> Compiled:
        waiting = asyncio.wrap_future(work)
        await asyncio.wait({asyncio.shield(waiting)}, timeout=self._options.max_seconds)
        if work.cancelled():
            raise _closed()
        if work.done():
            return work.result()
        if not (work.running() and self._vocabulary.ready):
            raise QueueFullError(
                f"{len(self._running)} constraints wait to be compiled, and this one was not begun within "
                f"{self._options.max_seconds:g} s; try again later",
                retry_after=1.0,
            )
        raise LimitExceededError(
            f"{constraint.param}: it was not compiled within {self._options.max_seconds:g} s "
            "(max_grammar_seconds); simplify it.",
            param=constraint.param,
        )

    def _submit(self, task: Callable[P, T], *args: P.args, **named: P.kwargs) -> Future[T]:
        # A thread takes the size of its stack from here; the pool starts it on demand.
        usual = threading.stack_size(_STACK_BYTES)
        try:
            return self._pool.submit(task, *args, **named)
        except RuntimeError as error:
            raise _closed() from error
        finally:
            threading.stack_size(usual)

    def _read(self) -> None:
        """On a compiling thread. What is wrong with the tokenizer is told to those who need it."""
        with contextlib.suppress(DefinitionError):
            _ = self._vocabulary.made

    def _compile(self, constraint: Constraint) -> Compiled:
        """On a compiling thread. A definition that fails is remembered too."""
        made: Compiled
        try:
            made = Grammar(constraint, self._vocabulary)
        except DefinitionError as fault:
            made = DefinitionError(fault.reason, limit=fault.limit)  # without the frames that raised it
        except Exception as error:  # noqa: BLE001 whatever the library raises is about this definition
            made = DefinitionError(f"cannot be compiled: {shortened(str(error))}")
        with self._lock:
            self.compiled += 1
            self._running.pop(constraint, None)
            self._known[constraint] = made
            while len(self._known) > self._options.remembered:
                self._known.popitem(last=False)
        return made


def _closed() -> ShuttingDownError:
    return ShuttingDownError("the server shuts down; send the request again", retry_after=1.0)
