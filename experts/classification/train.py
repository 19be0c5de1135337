"""Training the suite: one full fine-tune of the encoder with a head of its own for each task.

Knows tasks and Hugging Face's sequence classifiers; does not know merging or bundles. Runs of a task are
short, so a killed suite goes on with the task that it was at: folders are renamed into place when done.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experts.classification.task import ClassificationTask, Labelled

RECORD_NAME = "training.json"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes a training run.

    Attributes:
        train_words: move the word embeddings too. They are half of MiniLM and most of an optimiser step.
    """

    steps: int = 160
    batch: int = 32
    learning_rate: float = 2e-4
    head_learning_rate: float = 2e-3
    warmup: int = 15
    clip: float = 1.0
    max_tokens: int = 64
    train_words: bool = False
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """`ids` and `mask` (batch, length) int64, `labels` (batch,) int64."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def train_suite(
    tasks: Sequence[ClassificationTask],
    base: Path,
    target: Path,
    downloads: Path,
    recipe: Recipe,
    progress: Progress,
) -> list[Path]:
    """Train every task whose folder in `target` is not there yet; returns all the folders.

    Each task brings its own number of steps and batch; the rest is the recipe's.
    """
    for task in tasks:
        folder = target / task.name
        if is_trained(folder):
            progress(f"{task.name}: already trained")
            continue
        examples = task.load("train", downloads)
        suited = replace(recipe, steps=task.steps, batch=task.batch)
        train_classifier(task.name, task.labels, examples, base, folder, suited, progress)
    return [target / task.name for task in tasks]


def is_trained(folder: Path) -> bool:
    """Whether the folder holds a finished classifier (it is only ever renamed into place)."""
    return (folder / RECORD_NAME).is_file()


def train_classifier(
    name: str,
    labels: Sequence[str],
    examples: Sequence[Labelled],
    base: Path,
    folder: Path,
    recipe: Recipe,
    progress: Progress,
) -> None:
    """Fine-tune encoder and head and save an ordinary Hugging Face folder. The same inputs give the same bytes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = new_classifier(base, labels, recipe.seed)
    model.train()
    model.get_input_embeddings().requires_grad_(recipe.train_words)
    data = [(encode(tokenizer, example.text, recipe.max_tokens), example.label) for example in examples]
    trained = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    body = [parameter for key, parameter in trained if is_encoder(model, key)]
    head = [parameter for key, parameter in trained if not is_encoder(model, key)]
    groups = [
        {"params": body, "peak": recipe.learning_rate},
        {"params": head, "peak": recipe.head_learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=0.0)
    running = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        for step, batch in enumerate(batches(data, recipe, tokenizer.pad_token_id)):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * schedule(step, recipe)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            loss = nn.functional.cross_entropy(logits.float(), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
            if (step + 1) % 25 == 0:
                progress(f"{name}: step {step + 1}/{recipe.steps}, loss {running:.3f}")
    _save(model, tokenizer, folder, recipe)


def new_classifier(base: Path, labels: Sequence[str], seed: int) -> Any:
    """The base with a fresh head for these labels; float32."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            base,
            dtype=torch.float32,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )


def is_encoder(model: Any, parameter: str) -> bool:
    """Whether a parameter belongs to the encoder; all others are the head."""
    return parameter.startswith(f"{model.base_model_prefix}.")


def encode(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    """Token ids with special tokens, cut on the right."""
    return list(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"])


def schedule(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, then cosine to a twentieth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def batches(data: Sequence[tuple[list[int], int]], recipe: Recipe, pad: int) -> Iterator[Batch]:
    """Exactly `steps` batches, the same for the same seed: epochs reshuffled, lengths bucketed."""
    rng = random.Random(recipe.seed)  # noqa: S311 - a shuffle, not a secret
    produced = 0
    while True:
        order = list(range(len(data)))
        rng.shuffle(order)
        window = 8 * recipe.batch
        for start in range(0, len(order), window):
            bucket = sorted(order[start : start + window], key=lambda i: len(data[i][0]))
            groups = [bucket[i : i + recipe.batch] for i in range(0, len(bucket), recipe.batch)]
            rng.shuffle(groups)
            for group in groups:
                if produced == recipe.steps:
                    return
                produced += 1
                yield collate([data[i] for i in group], pad)


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> Batch:
    """Pad on the right."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (tokens, _) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return Batch(ids, mask, torch.tensor([label for _, label in rows]))


def _save(model: Any, tokenizer: Any, folder: Path, recipe: Recipe) -> None:
    model.eval()
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / RECORD_NAME).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(scratch, folder)
