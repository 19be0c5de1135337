"""The engine without HTTP, threads or event loop: what serving is held against."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from experts.bundle import Bundle
from service.core import Failed, GenerationRequest
from service.engine.engine import Engine
from service.engine.model import SharedModel
from service.engine.roster import StepResult
from service.engine.routing import Dispatcher, RoutingDefaults
from service.scheduler.catalogue import Catalogue
from service.scheduler.scheduler import Budget, Scheduler


class EngineAlone:
    """An engine over a bundle, stepped by hand."""

    def __init__(self, bundle: Bundle, rows: int = 32, max_tokens: int = 1024) -> None:
        self.bundle = bundle
        self.experts = bundle.expert_names()
        model = SharedModel(
            bundle.shared_path,
            rows=rows,
            max_tokens=max_tokens,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            spec=None,
        )
        self.vocabulary = model.vocabulary
        tokenizer = AutoTokenizer.from_pretrained(bundle.shared_path)
        self._catalogue = Catalogue()
        self._engine = Engine(
            model,
            Scheduler(rows, Budget()),
            Dispatcher(self._catalogue, None, RoutingDefaults()),
            tokenizer.backend_tokenizer,
            frozenset({tokenizer.eos_token_id}),
        )
        for name in self.experts:
            self._engine.publish(model.bank.prepare(bundle.expert(name)))

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
