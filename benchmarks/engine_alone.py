"""The engine without HTTP, threads or event loop: what serving is held against."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from experts.bundle import Bundle
from service.core import Failed, GenerationRequest
from service.engine.engine import Engine
from service.engine.model import SharedModel
from service.engine.roster import StepResult
from service.engine.routing import Dispatcher, RoutingDefaults
from service.scheduler.catalogue import Catalogue
from service.scheduler.scheduler import Budget, Scheduler


def open_engine(bundle: Bundle, *, rows: int = 32, max_tokens: int = 1024) -> tuple[Engine, Tokenizer]:
    """The engine of a bundle in bfloat16 on the CPU, as the server would open it, and its tokenizer."""
    router = bundle.router()
    tokenizer = AutoTokenizer.from_pretrained(bundle.shared_path)
    model = SharedModel(
        bundle.shared_path,
        rows=rows,
        max_tokens=max_tokens,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        spec=router.spec if router else None,
    )
    engine = Engine(
        model,
        Scheduler(rows, Budget()),
        Dispatcher(Catalogue(), router, RoutingDefaults()),
        tokenizer.backend_tokenizer,
        frozenset({tokenizer.eos_token_id}),
    )
    for name in bundle.expert_names():
        engine.publish(model.bank.prepare(bundle.expert(name)))
    return engine, tokenizer.backend_tokenizer


class EngineAlone:
    """An engine over a bundle, stepped by hand."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.experts = bundle.expert_names()
        self._engine, _ = open_engine(bundle)
        self.vocabulary = self._engine.model.vocabulary

    @classmethod
    def open(cls, path: Path) -> "EngineAlone":
        """The engine of a bundle on disk."""
        return cls(Bundle.open(path))

    def run(self, make: Callable[[int], GenerationRequest], total: int, at_once: int) -> float:
        """Seconds to finish `total` requests with `at_once` of them in flight."""
        started, sent, live = time.perf_counter(), 0, 0
        while live or sent < total:
            while sent < total and live < at_once:
                self._submit(make(sent))
                sent, live = sent + 1, live + 1
            result = self._engine.step()
            failed = [event for _, event in result.events if isinstance(event, Failed)]
            if failed:
                raise failed[0].error
            live -= len(result.ended)
        return time.perf_counter() - started

    def _submit(self, request: GenerationRequest) -> None:
        fixed = self._engine.dispatcher.fixed(request.routing)
        self._engine.add(request, fixed, time.monotonic(), StepResult())
