"""The classifier as the API sees it: a bounded queue, a thread that takes batches from it, and its answers.

Texts wait in one line; whatever waits when the thread is free runs together, up to the batch's limits. There is
no timer: one text alone starts at once, and batches grow with the load.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experts.classification.bundle import ClassifierBundle
from service.classify.model import ClassifierModel
from service.classify.words import Classified, ClassifyRecorder, Text
from service.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    LimitExceededError,
    QueueFullError,
    RequestFailedError,
    ShuttingDownError,
    TwinserveError,
)

_log = logging.getLogger(__name__)

BATCH_TOKENS = 4096
"""Padded tokens of one pass."""

_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class _Waiting:
    """A text in the line."""

    text: Text
    arrived: float
    answer: "Future[Classified]" = field(default_factory=Future)


class Classifier:
    """Called on the event loop; the model runs on a thread of its own until `close`.

    Args:
        max_queue: texts that wait beyond those that run.
        max_batch: texts of one pass.
        max_text_tokens: an operator's limit of one text; None is the encoder's own.
        threads: CPU threads of a pass.
    """

    def __init__(
        self,
        model: ClassifierModel,
        recorder: ClassifyRecorder,
        *,
        max_queue: int = 256,
        max_batch: int = 32,
        max_text_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.name = model.name
        self.labels = model.labels
        self.has_router = model.router is not None
        self.max_tokens = min(model.max_tokens, max_text_tokens or model.max_tokens)
        self._model = model
        self._recorder = recorder
        self._max_queue = max_queue
        self._max_batch = max_batch
        self._threads = threads
        self._line: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # One thread: a fast tokenizer refuses to be reconfigured by two threads at once.
        self._tokenize = ThreadPoolExecutor(max_workers=1, thread_name_prefix="classify-tokenize")
        self._thread = threading.Thread(target=self._run, name="twinserve-classify", daemon=True)
        self._thread.start()

    async def encode(self, texts: Sequence[str], truncate: int | None) -> list[tuple[int, ...]]:
        """Token ids of each text, special tokens included.

        Args:
            truncate: cut texts on the right to that many tokens; None refuses those that are too long.

        Raises:
            InvalidRequestError: a text has no tokens, or is not text.
            LimitExceededError: a text or `truncate` is longer than the encoder or the operator allows.
        """
        if truncate is not None and truncate > self.max_tokens:
            raise LimitExceededError(
                f"truncate_prompt_tokens is {truncate}; a text has at most {self.max_tokens} tokens.",
                param="truncate_prompt_tokens",
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenize, self._encode, texts, truncate)

    async def classify(self, texts: Sequence[Text]) -> list[Classified]:
        """Answers in the order of the texts. Cancelling it takes the texts that wait out of the line.

        Raises:
            QueueFullError: the line has no room for all of them; none has entered it.
            ShuttingDownError: the server drains.
            TwinserveError: the first text that failed says why.
        """
        waiting = self._admit(texts)
        futures = [asyncio.wrap_future(one.answer) for one in waiting]
        try:
            results = await asyncio.gather(*futures, return_exceptions=True)
        finally:
            for one in waiting:
                one.answer.cancel()
        answers = []
        for index, result in enumerate(results):
            if isinstance(result, RequestFailedError):
                result.param = "input" if len(texts) == 1 else f"input[{index}]"
            if isinstance(result, BaseException):
                raise result
            answers.append(result)
        return answers

    @property
    def waiting(self) -> int:
        """Texts in the line."""
        return len(self._line)

    def close(self) -> None:
        """End the thread after its current batch; texts that still wait are refused. Idempotent."""
        self._end(_shutting_down, ())
        self._thread.join()
        self._tokenize.shutdown()

    def _admit(self, texts: Sequence[Text]) -> list[_Waiting]:
        now = time.monotonic()
        waiting = [_Waiting(text, now) for text in texts]
        with self._changed:
            if self._closed:
                raise _shutting_down()
            if len(self._line) + len(waiting) > self._max_queue:
                # Texts of clients that hung up must not hold places.
                self._line = deque(one for one in self._line if not one.answer.cancelled())
            if len(self._line) + len(waiting) > self._max_queue:
                raise QueueFullError(
                    f"{len(self._line)} texts wait for the classifier and {len(waiting)} more do not fit "
                    f"(max_queue {self._max_queue}); try again soon, or send fewer.",
                    retry_after=_RETRY_SECONDS,
                )
            self._line.extend(waiting)
            self._changed.notify()
        return waiting

    def _encode(self, texts: Sequence[str], truncate: int | None) -> list[tuple[int, ...]]:
        encoded = []
        for index, text in enumerate(texts):
            param = "input" if len(texts) == 1 else f"input[{index}]"
            try:
                ids = self._model.tokenizer(text, truncation=truncate is not None, max_length=truncate)[
                    "input_ids"
                ]
            except (UnicodeEncodeError, TypeError) as error:  # a lone surrogate is JSON but not text
                raise InvalidRequestError(f"{param} cannot be encoded: {error}.", param=param) from error
            if not text.strip() or not ids:
                raise InvalidRequestError(f"{param} has no text; send some.", param=param)
            if len(ids) > self.max_tokens:
                raise ContextLengthError(
                    f"{param} has {len(ids)} tokens; the limit is {self.max_tokens}: send less, or cut it with "
                    "truncate_prompt_tokens.",
                    param=param,
                )
            encoded.append(tuple(ids))
        return encoded

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        batch: list[_Waiting] = []
        try:
            while batch := self._next_batch():
                self._answer(batch)
        except BaseException:  # noqa: BLE001 - the thread's outermost net
            _log.critical("the classifier's thread has ended", exc_info=True)
        finally:
            # However the thread ends, nobody is left waiting.
            self._end(_dead, batch)

    def _answer(self, batch: Sequence[_Waiting]) -> None:
        started = time.monotonic()
        answers = self._model.classify([one.text for one in batch])
        now = time.monotonic()
        for one, answer in zip(batch, answers, strict=True):
            failed = isinstance(answer, TwinserveError)
            self._recorder.on_classify_text(now - one.arrived, failed=failed)
            if isinstance(answer, TwinserveError):
                one.answer.set_exception(answer)
            else:
                one.answer.set_result(answer)
        longest = max(len(one.text.ids) for one in batch)
        routed = sum(one.text.routing.gates is None for one in batch)
        self._recorder.on_classify_batch(
            texts=len(batch), tokens=longest * len(batch), routed=routed, seconds=now - started
        )

    def _end(self, reason: Callable[[], TwinserveError], running: Sequence[_Waiting]) -> None:
        """Take no more texts and refuse those that wait; `running` are those that nobody will answer."""
        with self._changed:
            self._closed = True
            left = list(self._line)
            self._line.clear()
            self._changed.notify_all()
        for one in left:
            if one.answer.set_running_or_notify_cancel():
                one.answer.set_exception(reason())
        for one in running:
            if not one.answer.done():
                one.answer.set_exception(reason())

    def _next_batch(self) -> list[_Waiting]:
        """What runs next, at least one text; empty once closed."""
        while True:
            with self._changed:
                while not self._line and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return []
                taken = self._take()
            batch = [one for one in taken if one.answer.set_running_or_notify_cancel()]
            if batch:
                return batch

    def _take(self) -> list[_Waiting]:
        taken = [self._line.popleft()]
        longest = len(taken[0].text.ids)
        while self._line and len(taken) < self._max_batch:
            longest = max(longest, len(self._line[0].text.ids))
            if longest * (len(taken) + 1) > BATCH_TOKENS:
                break
            taken.append(self._line.popleft())
        return taken


def open_classifier(
    path: Path,
    recorder: ClassifyRecorder,
    *,
    device: str = "auto",
    max_queue: int = 256,
    max_batch: int = 32,
    max_text_tokens: int | None = None,
    threads: int | None = None,
) -> Classifier:
    """Open a classifier bundle and start its thread.

    Raises:
        BundleError: it is missing, of another kind, or broken.
        ExpertRejectedError, RoutingError: its parts do not fit one another.
    """
    bundle = ClassifierBundle.open(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Classifier(
        ClassifierModel(bundle, device),
        recorder,
        max_queue=max_queue,
        max_batch=max_batch,
        max_text_tokens=max_text_tokens,
        threads=threads,
    )


def _dead() -> EngineDeadError:
    return EngineDeadError("The classifier's thread has ended; restart the server.")


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("The server is shutting down; try another replica.", retry_after=_RETRY_SECONDS)
