"""A made-up family for the studies: a random Llama of two layers, three LoRAs, tasks that each is right about."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.checkpoint import Checkpoint, open_fine_tune
from experts.evaluation.generation import plain_generator
from experts.evaluation.setting import RouterTexts, Setting
from experts.evaluation.task import Question, Task
from experts.evaluation.weights import PatchedModel
from tests.fixtures.tiny import tiny_lora, tiny_model

EXPERTS = {"alpha": "add {} to", "beta": "the opposite of {}", "gamma": "SORT {}!"}
HELD_OUT = "delta"
_WORDS = (
    "river",
    "candle",
    "green",
    "seven",
    "mountain",
    "quiet",
    "paper",
    "orbit",
    "lemon",
    "stone",
    "window",
)
PREFIX = "<|im_start|>user\n"


def tiny_setting(path: Path, name: str = "tiny") -> Setting:
    """The reference answers are what each expert says, so that it scores 1 on its own task."""
    base = tiny_model("llama", path / "base", dtype=torch.float64)
    folders = {
        expert: tiny_lora(path / expert, base, rank=2, seed=seed, strength=1.0)
        for seed, expert in enumerate(EXPERTS)
    }
    checkpoint = Checkpoint.open(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    patched = PatchedModel(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64))
    tasks, prompts = {}, {}
    for expert, form in EXPERTS.items():
        tune = open_fine_tune(expert, folders[expert], checkpoint)
        patched.apply((parameter, tune.delta(parameter)) for parameter in checkpoint.names)
        tasks[expert] = _task(expert, form, patched.model, tokenizer)
        prompts[expert] = RouterTexts(_texts(form, 10, 16), _texts(form, 16, 22))
    patched.restore()
    tasks[HELD_OUT] = _task(HELD_OUT, "{} is what", patched.model, tokenizer)
    return Setting(name, base, folders, tasks, prompts, PREFIX, {"multi": folders["alpha"]}, router_layer=1)


def overlapping(setting: Setting) -> Setting:
    """The same with a test question among the validation questions."""
    task = setting.tasks["alpha"]
    spoiled = replace(task, validation=(*task.validation, task.test[0]))
    return replace(setting, tasks={**setting.tasks, "alpha": spoiled})


def _texts(form: str, start: int, end: int) -> tuple[str, ...]:
    words = [f"{_WORDS[i % len(_WORDS)]} {i}" for i in range(start, end)]
    return tuple(f"{PREFIX}{form.format(word)}<|im_end|>\n<|im_start|>assistant\n" for word in words)


def _task(name: str, form: str, model: Any, tokenizer: Any) -> Task:
    texts = _texts(form, 0, 10)
    answers = plain_generator(model, tokenizer, 1)(texts, 3)
    asked = tuple(Question(text, answer) for text, answer in zip(texts, answers, strict=True))
    return Task(name, "exact", 3, asked[:4], asked[4:])
