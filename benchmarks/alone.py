"""The engine without HTTP, threads or event loop: what serving is held against, and what rivals in process meet."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from experts.bundle import Bundle, ExpertWeights
from experts.routing import Router
from service.core import ExpertKey, Failed, Finished, GenerationRequest, StepStats, TextDelta
from service.engine.assembly import EngineOptions, assemble
from service.engine.change import LiveChange, prepare
from service.engine.loader import BundleSource, ExpertSource, loader_thread
from service.engine.roster import StepResult
from service.gating.slots import SlotPool
from service.serve import runtime_config
from service.settings import Settings


@dataclass(slots=True)
class AloneRun:
    """What one run took.

    Attributes:
        seconds: from the first request to the last token.
        tokens: generated in all.
        steps: statistics of every step.
        first_tokens: seconds from submission to the first token of every request, in order of their ends.
    """

    seconds: float = 0.0
    tokens: int = 0
    steps: list[StepStats] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return self.tokens / self.seconds

    @property
    def modes(self) -> Counter[str]:
        """Steps by how their gates were served."""
        return Counter(step.mode for step in self.steps)

    def decode_seconds(self, rows: int) -> list[float]:
        """Times of the steps that decoded that many rows and did nothing else."""
        return [s.seconds for s in self.steps if s.decode_rows == rows and not s.prefill_tokens]


class Nowhere:
    """A source for engines that have all their experts."""

    def load(self, key: ExpertKey) -> ExpertWeights:
        """Never called where slots are unlimited."""
        raise LookupError(str(key))


class EngineAlone:
    """An engine as the server would open it, stepped by hand on the calling thread, with all of torch's threads.

    Args:
        path: the shared model's folder.
        options: what differs from the server's defaults, made of `defaults()`.
    """

    def __init__(
        self,
        path: Path,
        experts: Sequence[ExpertWeights] = (),
        *,
        router: Router | None = None,
        options: EngineOptions | None = None,
        pool: SlotPool | None = None,
        source: ExpertSource | None = None,
    ) -> None:
        chosen = options or defaults()
        limit = int(AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings)
        longest = min(limit, chosen.model.max_tokens)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.engine = assemble(
            path,
            replace(chosen, model=replace(chosen.model, max_tokens=longest)),
            router,
            self.tokenizer,
            pool=pool or SlotPool(),
            source=source or Nowhere(),
            executor=loader_thread(),
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        self._router = router
        self.experts: list[str] = []
        self.publish(*experts)

    @classmethod
    def of_bundle(cls, bundle: Bundle, options: EngineOptions | None = None) -> "EngineAlone":
        """With all the experts of a bundle, and its router."""
        return cls(
            bundle.shared_path,
            [bundle.expert(name) for name in bundle.expert_names()],
            router=bundle.router(),
            options=options,
            source=BundleSource(bundle.loader()),
        )

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        return self.engine.model.vocabulary

    def publish(self, *experts: ExpertWeights) -> None:
        """Register experts and give them slots."""
        held = self.engine.dispatcher.catalogue.held()
        change = LiveChange(experts, router=self._router)
        self.engine.apply(prepare(change, self.engine.model.bank, held, lazy=False))
        self.experts += [expert.name for expert in experts]

    def register(self, key: ExpertKey) -> None:
        """Register an expert that the source has, without a slot."""
        self.engine.dispatcher.catalogue.switch([key])
        self.experts.append(key.name)

    def run(self, requests: Sequence[GenerationRequest], at_once: int) -> AloneRun:
        """Finish all requests with `at_once` of them in flight.

        Raises:
            TwinserveError: one of them failed.
        """
        run, pending, live = AloneRun(), iter(requests), set[str]()
        started = time.perf_counter()
        while True:
            while len(live) < at_once and (request := next(pending, None)) is not None:
                live.add(request.id)
                self._submit(request, run, live)
            if not live:
                run.seconds = time.perf_counter() - started
                return run
            self._collect(self.engine.step(), run, live)

    def _submit(self, request: GenerationRequest, run: AloneRun, live: set[str]) -> None:
        chosen = request.routing
        fixed = self.engine.dispatcher.fixed(chosen) if chosen.gates is not None else None
        result = StepResult()
        self.engine.add(request, fixed, time.monotonic(), result)
        self._collect(result, run, live)

    def _collect(self, result: StepResult, run: AloneRun, live: set[str]) -> None:
        if result.stats is not None:
            run.steps.append(result.stats)
        run.first_tokens += [s.first_token_seconds for s in result.ended if s.first_token_seconds is not None]
        for request_id, event in result.events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, TextDelta):
                run.tokens += len(event.token_ids)
            if isinstance(event, Finished):
                live.remove(request_id)


def defaults() -> EngineOptions:
    """The engine's options as the server has them without any setting."""
    return runtime_config(Settings()).engine


def renamed(expert: ExpertWeights, name: str, generation: int = 1) -> ExpertWeights:
    """The same factors under another name: another expert, as far as the engine can tell."""
    return replace(expert, name=name, generation=generation)
