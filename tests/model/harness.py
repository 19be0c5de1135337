"""Drives the real engine step by step, and says what plain transformers answers on materialised weights."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experts.bundle import ExpertWeights
from experts.factors import SvdFactors
from experts.routing import Router
from service.core import (
    Event,
    ExpertKey,
    Failed,
    Finished,
    GenerationRequest,
    RoutingChoice,
    SamplingParams,
    StepStats,
    TextDelta,
)
from service.engine.assembly import EngineOptions, assemble
from service.engine.change import LiveChange, prepare
from service.engine.merged import MixMode
from service.engine.model import ModelOptions, NativeChoice
from service.engine.roster import StepResult
from service.gating.slots import SlotPool
from service.scheduler.policy import Budget, Limits, Policy
from tests.fixtures.executors import InlineExecutor

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def random_expert(
    model: PreTrainedModel,
    name: str,
    seed: int,
    generation: int = 1,
    ranks: Sequence[int] = (3,),
    exact: bool = True,
    only: Callable[[str], bool] = lambda _: True,
) -> ExpertWeights:
    """Random factors on every matrix (embeddings and heads too) and, if `exact`, on every bias and norm.

    `only` chooses among the parameters by name.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = itertools.cycle(ranks)
    factors, vectors = {}, {}
    for parameter_name, parameter in model.named_parameters():
        if not only(parameter_name):
            continue
        if parameter.dim() == 2:
            rows, columns = parameter.shape
            k = next(rank)
            u = torch.linalg.qr(torch.randn(rows, k, generator=generator)).Q
            v = torch.linalg.qr(torch.randn(columns, k, generator=generator)).Q
            strength = parameter.norm() / max(k, 1) ** 0.5 * 0.5
            sigma = strength * torch.rand(k, generator=generator).sort(descending=True).values
            factors[parameter_name] = SvdFactors(u, sigma, v.t().contiguous())
        elif exact:
            vectors[parameter_name] = 0.1 * torch.randn(parameter.shape, generator=generator)
    return ExpertWeights(name, generation, factors, vectors)


def inner(name: str) -> bool:
    """Matrices of decoder layers: what materialised weights can hold."""
    return "_proj." in name


def materialised(
    path: Path, mix: Sequence[tuple[ExpertWeights, float]], only: Callable[[str], bool] = lambda _: True
) -> PreTrainedModel:
    """A plain model with W* + Σ g·UΣVᵀ written into its weights, float32; `only` into some of them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for expert, gate in mix:
            for name, factors in expert.factors.items():
                if only(name):
                    parameters[name] += gate * factors.dense()
            for name, delta in expert.exact.items():
                if only(name):
                    parameters[name] += gate * delta
    return model


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy continuation by `transformers.generate`, never ending early."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def prompt_ids(seed: int, length: int, vocabulary: int) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())


class MemorySource:
    """Experts that were published in a test; those in `broken` cannot be loaded."""

    def __init__(self) -> None:
        self.experts: dict[ExpertKey, ExpertWeights] = {}
        self.broken: set[ExpertKey] = set()

    def load(self, key: ExpertKey) -> ExpertWeights:
        """Exactly that generation."""
        if key in self.broken:
            raise OSError(f"the disk has lost {key}")
        return self.experts[key]


class Harness:
    """The engine without a thread: `run` steps it until everything has ended."""

    def __init__(
        self,
        path: Path,
        experts: Sequence[ExpertWeights] = (),
        *,
        rows: int = 8,
        max_tokens: int = 128,
        budget: Budget | None = None,
        router: Router | None = None,
        dtype: torch.dtype = torch.float32,
        native: NativeChoice = "auto",
        int8: bool = False,
        kv_bytes: int = 2**22,
        policy: Policy | None = None,
        pool: SlotPool | None = None,
        mode: MixMode = "factored",
        single_pass: bool = False,
        merged_bytes: int = 2**30,
        prefix_cache: bool = True,
        executor: Executor | None = None,
    ) -> None:
        budget = budget or Budget(step_tokens=64, chunk_tokens=16)
        self.source = MemorySource()
        self.router = router
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.engine = assemble(
            path,
            EngineOptions(
                model=ModelOptions(
                    kv_bytes=kv_bytes,
                    max_tokens=max_tokens,
                    chunk_tokens=max(budget.step_tokens, budget.chunk_tokens),
                    native=native,
                    int8=int8,
                ),
                limits=Limits(rows),
                budget=budget,
                policy=policy or Policy(),
                prefix_cache=prefix_cache,
                mode=mode,
                merged_bytes=merged_bytes,
                single_pass=single_pass,
            ),
            router,
            self.tokenizer,
            pool=SlotPool() if pool is None else pool,
            source=self.source,
            executor=executor or InlineExecutor(),
            dtype=dtype,
            device=torch.device("cpu"),
        )
        self.model = self.engine.model
        self.catalogue = self.engine.dispatcher.catalogue
        if experts:
            self.publish(*experts)
        self.events: dict[str, list[Event]] = {}
        self.stats: list[StepStats] = []
        self.steps = 0

    def publish(self, *experts: ExpertWeights) -> None:
        """Generations go live together."""
        self.source.experts.update({ExpertKey(it.name, it.generation): it for it in experts})
        self.change(LiveChange(experts, router=self.router))

    def retire(self, name: str) -> None:
        """No new request gets the expert."""
        self.change(LiveChange(retire=(name,), router=self.router))

    def change(self, change: LiveChange) -> None:
        """Experts, router and trials change together, as the runtime changes them."""
        limited = self.engine.residency.pool.limited
        self.engine.apply(prepare(change, self.model.bank, self.catalogue.held(), lazy=limited))

    def stage(self, expert: ExpertWeights) -> None:
        """A generation is there for those that name it."""
        self.engine.stage(self.model.bank.prepare(expert), expert)

    def register(self, expert: ExpertWeights) -> None:
        """A generation goes live without a look at it: it is loaded when it is wanted."""
        key = ExpertKey(expert.name, expert.generation)
        self.source.experts[key] = expert
        self.catalogue.switch([key])

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        gates: Mapping[str, float] | None = None,
        sampling: SamplingParams = GREEDY,
        generations: Mapping[str, int] | None = None,
        **more: Any,
    ) -> None:
        """Queue a request; gates of None ask the router."""
        choice = RoutingChoice(gates=gates, generations=generations or {})
        request = GenerationRequest(request_id, tuple(prompt), sampling, choice, **more)
        fixed = self.engine.dispatcher.fixed(request.routing) if gates is not None else None
        result = StepResult()
        self.events[request_id] = []
        self.engine.add(request, fixed, time.monotonic(), result)
        self._collect(result)

    def cancel(self, request_id: str) -> None:
        """End a request early."""
        result = StepResult()
        self.engine.cancel(request_id, result)
        self._collect(result)

    def step(self) -> StepResult:
        """One engine step."""
        result = self.engine.step()
        self.steps += 1
        if result.stats is not None:
            self.stats.append(result.stats)
        self._collect(result)
        return result

    def run(self, limit: int = 2000) -> None:
        """Step until nothing is left."""
        while self.engine.busy:
            assert self.steps < limit, "the engine does not come to an end"
            self.step()

    def tokens(self, request_id: str) -> list[int]:
        """Generated ids so far."""
        deltas = [event for event in self.events[request_id] if isinstance(event, TextDelta)]
        return [token for delta in deltas for token in delta.token_ids]

    def text(self, request_id: str) -> str:
        """Generated text so far."""
        return "".join(event.text for event in self.events[request_id] if isinstance(event, TextDelta))

    def finished(self, request_id: str) -> Finished:
        """The terminal event, which must be a good one and the only one."""
        last = self.terminal(request_id)
        assert isinstance(last, Finished), last
        return last

    def terminal(self, request_id: str) -> Event:
        """The one terminal event."""
        events = self.events[request_id]
        terminal = [event for event in events if isinstance(event, Finished | Failed)]
        assert len(terminal) == 1
        assert events[-1] is terminal[0]
        return terminal[0]

    @property
    def preemptions(self) -> int:
        """Of all steps."""
        return sum(stats.preemptions for stats in self.stats)

    @property
    def prefilled(self) -> int:
        """Prompt tokens computed in all steps."""
        return sum(stats.prefill_tokens for stats in self.stats)

    def assert_idle(self) -> None:
        """Nothing leaked: blocks, leases and bookkeeping are back where they began."""
        assert not self.engine.busy
        for events in self.events.values():
            assert isinstance(events[-1], Finished | Failed)
            assert sum(isinstance(event, Finished | Failed) for event in events) == 1
        self.engine.scheduler.check()
        kv = self.engine.scheduler.kv
        assert kv.used_blocks == 0
        assert kv.free_blocks + kv.cached_blocks == kv.total_blocks
        assert not self.engine.scheduler.running
        assert not self.engine.scheduler.waiting
        assert all(count == 0 for count in self.catalogue.leases().values())
        assert set(self.catalogue.leases()) == set(self.catalogue.held())
        roster, intake = self.engine._roster, self.engine._intake
        assert not (roster._live)
        assert not (roster._by_sequence)
        assert not (roster.unrouted)
        assert not (intake._parties)
        assert not (self.engine.scheduler._followers)
        assert not (self.engine.scheduler._deadlines)
        assert not (self.engine.residency._staged)
        assert not (self.engine.residency.loading)
        resident = {key for key in self.catalogue.held() if self.model.bank.resident(key)}
        assert self.model.bank.resident_count == len(resident) == len(self.engine.residency.pool)

    def _collect(self, result: StepResult) -> None:
        for request_id, event in result.events:
            self.events[request_id].append(event)
