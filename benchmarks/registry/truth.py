"""What must be answered: plain transformers on weights merged here, greedy, float32. Knows nothing of the server."""

import threading
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 12

Mix = tuple[tuple[str, float], ...]
"""Fine-tunes with their gates, sorted."""

_CLEAR = 1e-3
"""Logits apart: nearer ones may change places between two orders of adding the same numbers."""


class Truths:
    """Answers by mix and prompt, each computed once. Thread-safe.

    Args:
        shared: the bundle's shared model.
        base: the base model's folder.
        versions: fine-tune → LoRA folder.
    """

    def __init__(self, shared: Path, base: Path, versions: Mapping[str, Path]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(shared)
        self._model = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32).eval()
        self._shared = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._vectors = {name: self._vector(base, folder) for name, folder in versions.items()}
        self._known: dict[tuple[Mix, str], tuple[tuple[int, ...], float]] = {}
        self._lock = threading.Lock()
        self._loaded: Mix | None = ()

    def _vector(self, base: Path, folder: Path) -> dict[str, torch.Tensor]:
        """θ_t − θ* of every parameter that differs."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            tuned = PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
        return {
            name: tuned[name] - tensor
            for name, tensor in self._shared.items()
            if not torch.equal(tuned[name], tensor)
        }

    def tokens(self, mix: Mix, prompt: str) -> tuple[int, ...]:
        """The `TOKENS` tokens that follow."""
        return self._answer(mix, prompt)[0]

    def clear(self, mix: Mix, prompt: str) -> bool:
        """No step's two likeliest tokens are so near that rounding decides."""
        return self._answer(mix, prompt)[1] > _CLEAR

    def clear_prompts(self, candidates: Iterable[str], count: int) -> list[str]:
        """So many prompts that are clear for every fine-tune alone."""
        mixes: list[Mix] = [((name, 1.0),) for name in self._vectors]
        found = [prompt for prompt in candidates if all(self.clear(mix, prompt) for mix in mixes)]
        if len(found) < count:
            raise RuntimeError(f"only {len(found)} of the prompts are clear")
        return found[:count]

    def known(self) -> int:
        """Answers that were computed."""
        return len(self._known)

    @torch.inference_mode()
    def _answer(self, mix: Mix, prompt: str) -> tuple[tuple[int, ...], float]:
        with self._lock:
            if (mix, prompt) not in self._known:
                self._load(mix)
                self._known[mix, prompt] = self._greedy(prompt)
            return self._known[mix, prompt]

    def _load(self, mix: Mix) -> None:
        if mix == self._loaded:
            return
        parameters = self._model.state_dict()
        for name, tensor in self._shared.items():
            merged = tensor.clone()
            for version, gate in mix:
                if name in self._vectors[version]:
                    merged += gate * self._vectors[version][name]
            parameters[name].copy_(merged)
        self._loaded = mix

    def _greedy(self, prompt: str) -> tuple[tuple[int, ...], float]:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        said: list[int] = []
        margin = float("inf")
        found = self._model(ids, use_cache=True)
        while True:
            best = found.logits[0, -1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            said.append(int(best.indices[0]))
            if len(said) == TOKENS:
                return tuple(said), margin
            found = self._model(best.indices[:1][None], past_key_values=found.past_key_values, use_cache=True)
