"""Promises of the classifier's line: bounded, batched, left without a trace, closed without a hang."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from experts.classification.bundle import ClassifierBundle
from service.classify import Classified, Classifier, Text
from service.classify.model import ClassifierModel
from service.core import RoutingChoice
from service.errors import EngineDeadError, QueueFullError, ShuttingDownError, TwinserveError
from tests.fixtures.classifiers import TinyClassifiers, tiny_classifiers

NAMED = RoutingChoice(gates={"tone": 1.0})
TEXT = Text((2, 7, 8, 3), NAMED)
BROKEN = Text((9999,), NAMED)


class GatedModel(ClassifierModel):
    """The real model, whose batches wait until the test lets them go."""

    def __init__(self, bundle: ClassifierBundle) -> None:
        super().__init__(bundle)
        self.free = threading.Event()
        self.entered = threading.Event()

    def classify(self, texts: Sequence[Text]) -> list[Classified | TwinserveError]:
        self.entered.set()
        assert self.free.wait(30)
        return super().classify(texts)


@dataclass
class Recorder:
    batches: list[int] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)

    def on_classify_batch(self, *, texts: int, tokens: int, routed: int, seconds: float) -> None:
        assert tokens >= texts
        assert seconds > 0
        self.batches.append(texts)

    def on_classify_text(self, seconds: float, *, failed: bool) -> None:
        self.failed.append(failed)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> TinyClassifiers:
    return tiny_classifiers(tmp_path_factory.mktemp("classifiers"), router=False)


@pytest.fixture
def model(family: TinyClassifiers) -> GatedModel:
    return GatedModel(ClassifierBundle.open(family.bundle))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def classifier(model: GatedModel, recorder: Recorder) -> Iterator[Classifier]:
    made = Classifier(model, recorder, max_queue=4, max_batch=3, threads=1)
    yield made
    model.free.set()
    made.close()


async def started(model: GatedModel, classifier: Classifier) -> "asyncio.Task[list[Classified]]":
    """One text in the thread's hands, so that what follows waits in the line."""
    task = asyncio.create_task(classifier.classify([TEXT]))
    await asyncio.to_thread(model.entered.wait, 30)
    return task


def test_a_full_line_refuses_all_texts_of_a_request_and_keeps_none(model, classifier):
    async def run() -> None:
        first = await started(model, classifier)
        waiting = asyncio.create_task(classifier.classify([TEXT] * 3))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as refusal:
            await classifier.classify([TEXT] * 2)
        assert refusal.value.retry_after is not None
        assert classifier.waiting == 3
        model.free.set()
        assert len(await first) == 1
        assert len(await waiting) == 3

    asyncio.run(run())


def test_what_waits_runs_together(model, classifier, recorder):
    async def run() -> None:
        first = await started(model, classifier)
        others = [asyncio.create_task(classifier.classify([TEXT])) for _ in range(4)]
        await asyncio.sleep(0)
        model.free.set()
        await asyncio.gather(first, *others)

    asyncio.run(run())
    classifier.close()
    assert recorder.batches == [1, 3, 1]
    assert recorder.failed == [False] * 5


def test_a_request_that_is_given_up_leaves_the_line(model, classifier, recorder):
    async def run() -> None:
        first = await started(model, classifier)
        gone = asyncio.create_task(classifier.classify([TEXT] * 4))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        # Its places are free at once, though the thread has not looked at the line since.
        stays = asyncio.create_task(classifier.classify([TEXT] * 2))
        await asyncio.sleep(0)
        model.free.set()
        assert len(await stays) == 2
        await first

    asyncio.run(run())
    classifier.close()
    assert sum(recorder.batches) == 3


def test_giving_up_what_already_runs_harms_nobody(model, classifier):
    async def run() -> None:
        first = await started(model, classifier)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        model.free.set()
        assert len(await classifier.classify([TEXT])) == 1

    asyncio.run(run())


def test_a_broken_text_fails_its_own_request_alone_and_is_named(model, classifier, recorder):
    async def run() -> None:
        first = await started(model, classifier)
        broken = asyncio.create_task(classifier.classify([TEXT, BROKEN]))
        good = asyncio.create_task(classifier.classify([TEXT]))
        await asyncio.sleep(0)
        model.free.set()
        with pytest.raises(TwinserveError) as failure:
            await broken
        assert failure.value.param == "input[1]"
        assert len(await good) == len(await first) == 1

    asyncio.run(run())
    classifier.close()
    assert sorted(recorder.failed) == [False, False, False, True]


def test_closing_refuses_what_waits_and_what_comes(model, classifier):
    async def run() -> None:
        first = await started(model, classifier)
        waiting = asyncio.create_task(classifier.classify([TEXT]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(classifier.close))
        with pytest.raises(ShuttingDownError):
            await waiting
        model.free.set()
        assert len(await first) == 1
        await closing
        with pytest.raises(ShuttingDownError):
            await classifier.classify([TEXT])

    asyncio.run(run())


def test_a_thread_that_ends_leaves_nobody_waiting(model, classifier, monkeypatch):
    def broken(texts: Sequence[Text]) -> list[Classified | TwinserveError]:
        raise SystemExit

    async def run() -> None:
        monkeypatch.setattr(model, "classify", broken)
        with pytest.raises(EngineDeadError):
            await classifier.classify([TEXT])

    asyncio.run(run())


def test_classifier_and_tokens_are_of_one_mind_about_length(classifier):
    async def run() -> None:
        assert [len(ids) for ids in await classifier.encode(["ant house"], None)] == [4]
        assert [len(ids) for ids in await classifier.encode(["ant " * 90], classifier.max_tokens)] == [40]

    asyncio.run(run())
