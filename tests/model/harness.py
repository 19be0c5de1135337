"""Drives the real engine step by step, and says what plain transformers answers on materialised weights."""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experts.bundle import ExpertWeights
from experts.factors import SvdFactors
from experts.routing import Router
from service.core import Event, Failed, Finished, GenerationRequest, RoutingChoice, SamplingParams, TextDelta
from service.engine.engine import Engine
from service.engine.model import SharedModel
from service.engine.roster import StepResult
from service.engine.routing import Dispatcher, RoutingDefaults
from service.scheduler.catalogue import Catalogue
from service.scheduler.scheduler import Budget, Scheduler

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def random_expert(
    model: PreTrainedModel,
    name: str,
    seed: int,
    generation: int = 1,
    ranks: Sequence[int] = (3,),
    exact: bool = True,
) -> ExpertWeights:
    """Random factors on every matrix (embeddings and heads too) and, if `exact`, on every bias and norm."""
    generator = torch.Generator().manual_seed(seed)
    rank = itertools.cycle(ranks)
    factors, vectors = {}, {}
    for parameter_name, parameter in model.named_parameters():
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


def materialised(path: Path, mix: Sequence[tuple[ExpertWeights, float]]) -> PreTrainedModel:
    """A plain model with W* + Σ g·UΣVᵀ written into its weights, float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for expert, gate in mix:
            for name, factors in expert.factors.items():
                parameters[name] += gate * factors.dense()
            for name, delta in expert.exact.items():
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
    ) -> None:
        self.model = SharedModel(
            path,
            rows=rows,
            max_tokens=max_tokens,
            dtype=dtype,
            device=torch.device("cpu"),
            spec=router.spec if router else None,
        )
        self.catalogue = Catalogue()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.engine = Engine(
            self.model,
            Scheduler(rows, budget or Budget(step_tokens=64, chunk_tokens=16)),
            Dispatcher(self.catalogue, router, RoutingDefaults()),
            self.tokenizer.backend_tokenizer,
            frozenset({self.tokenizer.eos_token_id}),
        )
        for expert in experts:
            self.publish(expert)
        self.events: dict[str, list[Event]] = {}
        self.steps = 0

    def publish(self, expert: ExpertWeights) -> None:
        """A generation goes live."""
        self.engine.publish(self.model.bank.prepare(expert))

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        gates: Mapping[str, float] | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> None:
        """Queue a request; gates of None ask the router."""
        request = GenerationRequest(request_id, tuple(prompt), sampling, RoutingChoice(gates=gates))
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

    def assert_idle(self) -> None:
        """Nothing leaked: rows, leases and bookkeeping are back where they began."""
        assert not self.engine.busy
        assert self.engine.scheduler.rows.free == self.engine.scheduler.rows.count
        assert not self.engine.scheduler.running
        assert not self.engine.scheduler.waiting
        assert all(count == 0 for count in self.catalogue.leases().values())
        assert set(self.catalogue.leases()) == set(self.catalogue.current().values())

    def _collect(self, result: StepResult) -> None:
        for request_id, event in result.events:
            self.events[request_id].append(event)
