"""One setting opened in one process: any system answers questions on plain weights."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint import Checkpoint, FineTune, open_fine_tune
from experts.errors import EvaluationError
from experts.evaluation.changes import Weights, both
from experts.evaluation.features import prefixed_features
from experts.evaluation.gated import GatedModel
from experts.evaluation.greedy import Ask, Greedy
from experts.evaluation.routers import choose_gates, feature_spec, router_of
from experts.evaluation.scoring import score
from experts.evaluation.setting import Setting
from experts.evaluation.settled import settled
from experts.evaluation.systems import Adapter, Alone, Base, Coded, Static, System, Twin
from experts.evaluation.task import Question
from experts.evaluation.weights import PatchedModel
from experts.factors import Delta

Batch = Mapping[str, Sequence[Question]]
"""Task → questions."""


@dataclass(frozen=True)
class Answered:
    """One task's item scores, and what else was seen."""

    scores: tuple[float, ...]
    facts: Mapping[str, Any]


class Bench:
    """Loads a setting's base once; each question set is answered with the weights of the system asked for."""

    def __init__(self, setting: Setting, batch: int = 96) -> None:
        from experts.routing.loading import load_model, load_tokenizer

        self.setting = setting
        base = Checkpoint.open(setting.base)
        folders: dict[str, Path] = {**setting.experts, **setting.adapters}
        tunes: dict[str, FineTune] = {
            name: open_fine_tune(name, path, base) for name, path in folders.items()
        }
        self.weights = Weights(base, tunes)
        self._tokenizer = load_tokenizer(setting.base)
        self._model = load_model(setting.base)
        self._patched = PatchedModel(self._model)
        self._prefix = self._ids(setting.prefix)
        self._greedy = Greedy(self._model, self._tokenizer, self._prefix, batch)
        self._routed: tuple[str, Any, float] = ("", None, 0.0)

    def answer(self, system: System, experts: tuple[str, ...], batch: Batch) -> dict[str, Answered]:
        """Answer and score; the model is left with whatever weights came last."""
        match system:
            case Base():
                return self._together((), batch, {"expert_bytes": 0})
            case Alone():
                return self._each(batch, {name: self.weights.fine_tune(name).items() for name in batch}, {})
            case Adapter():
                return self._together(self.weights.fine_tune(system.name).items(), batch, {})
            case Static():
                changes = self.weights.shared(system.method, experts)
                facts = {"build_seconds": self.weights.build_seconds, "expert_bytes": 0}
                return self._together(changes.items(), batch, facts)
            case Coded():
                return self._coded(system, experts, batch)
            case Twin() if system.router is None:
                return self._oracle(system, experts, batch)
            case Twin():
                return self._routed_answers(system, experts, batch)

    def _oracle(self, system: Twin, experts: tuple[str, ...], batch: Batch) -> dict[str, Answered]:
        """θ* + compressed v_t written into the weights, a task at a time."""
        found: dict[str, Answered] = {}
        for task in batch:
            if task not in experts:
                raise EvaluationError(f"task {task} has no expert among {', '.join(experts)}; use a router")
            own = self.weights.exclusive(task, system.shared, experts, system.compression)
            shared = self.weights.shared(system.shared, experts)
            facts = {"expert_bytes": own.nbytes, "build_seconds": self.weights.build_seconds + own.seconds}
            found |= self._together(both(shared, own.change), {task: batch[task]}, facts)
        return found

    def _coded(self, system: Coded, experts: tuple[str, ...], batch: Batch) -> dict[str, Answered]:
        """The same with a comparison codec; a task whose size the form cannot reach is left out."""
        found: dict[str, Answered] = {}
        for task in batch:
            point = self.weights.coded(task, system, experts)
            if point is not None:
                shared = self.weights.shared(system.shared, experts)
                facts = {"expert_bytes": point.nbytes, "relative_error": point.relative_error}
                found |= self._together(both(shared, point.changes), {task: batch[task]}, facts)
        return found

    def _routed_answers(self, system: Twin, experts: tuple[str, ...], batch: Batch) -> dict[str, Answered]:
        """θ* in the weights, the router's gates on each row."""
        plan, spec = system.router, system.compression
        if plan is None or spec is None:
            raise EvaluationError("Twin with a router needs compressed exclusive vectors; give a compression")
        own = [self.weights.exclusive(name, system.shared, experts, spec) for name in experts]
        if any(each.change.keys() - each.factors.keys() for each in own):
            raise EvaluationError("gates act on factors alone; compress with extras='fold'")
        shared = self.weights.shared(system.shared, experts)
        build = self.weights.build_seconds + sum(each.seconds for each in own)
        self._patched.apply(shared.items())
        reads = feature_spec(plan, self.setting.router_layer)
        router, fit_seconds = self._router(system, experts)
        asked = [(task, question) for task, questions in batch.items() for question in questions]
        features = prefixed_features(
            self._model, [self._ids(question.text) for _, question in asked], self._prefix, reads
        )
        gates, first = choose_gates(router, features, plan, experts)
        gated = GatedModel(self._model, [each.factors for each in own])
        try:
            answers = self._greedy.answers(
                [self._ask(task, question) for task, question in asked], gates, gated
            )
        finally:
            gated.close()
        facts = {
            "expert_bytes": max(each.nbytes for each in own),
            "build_seconds": build,
            "router_seconds": fit_seconds,
        }
        found = {}
        for task, questions in batch.items():
            rows = [row for row, (name, _) in enumerate(asked) if name == task]
            routed = Counter(first[row] or "" for row in rows)
            scores = self._scores(task, [answers[row] for row in rows], questions)
            found[task] = Answered(scores, {**facts, "routed": dict(routed)})
        return found

    def _router(self, system: Twin, experts: tuple[str, ...]) -> tuple[Any, float]:
        """Fitted on features of the shared expert, which is in the weights now; kept for the next task."""
        plan = system.router
        assert plan is not None
        of = f"{system.shared.model_dump_json()} {plan.model_dump_json()} {experts}"
        if self._routed[0] != of:
            started = time.process_time()
            reads = feature_spec(plan, self.setting.router_layer)
            split: dict[str, dict[str, Any]] = {"train": {}, "validation": {}}
            for side, found in split.items():
                for name in experts:
                    texts = getattr(self.setting.prompts[name], side)
                    texts = texts[: plan.prompts] if side == "train" else texts
                    ids = [self._ids(text) for text in texts]
                    found[name] = prefixed_features(self._model, ids, self._prefix, reads)
            router = router_of(plan, split["train"], split["validation"], reads)
            self._routed = (of, router, time.process_time() - started)
        return self._routed[1], self._routed[2]

    def _each(
        self, batch: Batch, changes: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> dict[str, Answered]:
        """Weights of its own for each task."""
        found: dict[str, Answered] = {}
        for task, questions in batch.items():
            found |= self._together(changes[task], {task: questions}, facts)
        return found

    def _together(
        self, changes: "Sequence[tuple[str, Delta | None]] | Any", batch: Batch, facts: Mapping[str, Any]
    ) -> dict[str, Answered]:
        """The same weights for all tasks."""
        self._patched.apply(changes)
        asked = [self._ask(task, question) for task, questions in batch.items() for question in questions]
        answers = iter(self._greedy.answers(asked))
        return {
            task: Answered(self._scores(task, [next(answers) for _ in questions], questions), facts)
            for task, questions in batch.items()
        }

    def _ask(self, task: str, question: Question) -> Ask:
        about = self.setting.tasks[task]
        return Ask(question.text, about.max_new_tokens, settled(about.metric, question.answer))

    def _scores(self, task: str, answers: Sequence[str], questions: Sequence[Question]) -> tuple[float, ...]:
        metric = self.setting.tasks[task].metric
        return tuple(
            score(metric, [answer], [question.answer]).mean
            for answer, question in zip(answers, questions, strict=True)
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
