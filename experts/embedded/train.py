"""Training the family: one LoRA expert after another on the frozen base.

Knows the base's chat format and the skills; does not know merging or bundles.
Three things make it quick enough for two CPU cores:
1. every prompt starts with the same system prompt, so its keys and values are
   computed once a step and shared by the batch (exact, gradients included);
2. logits only where an answer token is predicted;
3. batches of similar length.
"""

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experts.embedded.base import ensure_base
from experts.embedded.chat import Encoded, encode, shared_prefix
from experts.embedded.family import factors_folder
from experts.embedded.lora import EMBEDDED, LoraLinear, attach, detach, save_adapter
from experts.embedded.skills.skill import Lesson

IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes a training run."""

    rank: int = 4
    alpha: float = 8.0
    steps: int = 300
    batch: int = 32
    learning_rate: float = 2e-3
    warmup: int = 20
    clip: float = 1.0
    seed: int = 1
    checkpoint_every: int = 50


@dataclass(frozen=True)
class Batch:
    """One step's tensors: `ids` (batch, length); `targets` the same shape, IGNORE elsewhere."""

    ids: Tensor
    targets: Tensor


def train_family(
    skills: Sequence[Lesson],
    target: Path,
    work: Path,
    recipe: Recipe,
    progress: Progress,
    base: Path | None = None,
) -> list[Path]:
    """Train every skill whose folder in `target` is not there yet; return all the folders.

    `work` keeps the converted base, downloads and checkpoints: a run killed
    half-way goes on from the last checkpoint of the expert it was at. `base` is
    the frozen model's folder, the embedded base if left out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [skill for skill in skills if not finished(target / skill.name)]
    if missing:
        folder = base or ensure_base(work / "base")
        name = base.name if base else EMBEDDED
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # Eager attention: on so few tokens its backward pass takes a fifth of fused attention's time.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        for skill in missing:
            train_expert(skill, model, tokenizer, target / skill.name, work, recipe, progress, name)
    return [target / skill.name for skill in skills]


def shipped_recipe(name: str) -> Recipe:
    """How the committed expert of that name was trained; the default for one that is not committed."""
    record = factors_folder(name) / "training.json"
    if not record.is_file():
        return Recipe()
    return Recipe(**json.loads(record.read_text(encoding="utf-8")))


def finished(folder: Path) -> bool:
    """Whether the folder holds a complete adapter (it is only ever renamed into place)."""
    return (folder / "adapter_config.json").is_file()


def train_expert(
    skill: Lesson,
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    work: Path,
    recipe: Recipe,
    progress: Progress,
    base_name: str = EMBEDDED,
) -> None:
    """Train one expert and save it as a PEFT folder; leaves the model as it was."""
    prefix = shared_prefix(tokenizer)
    examples = skill.load("train", work / "downloads")[: recipe.steps * recipe.batch]
    data = [encode(tokenizer, example, prefix) for example in examples]
    layers = attach(model, recipe.rank, recipe.alpha, recipe.seed)
    try:
        checkpoint = work / "checkpoints" / folder.parent.name / f"{skill.name}.safetensors"
        _optimise(skill.name, model, layers, data, prefix, checkpoint, recipe, progress)
        scratch = folder.with_name(f".{folder.name}.tmp")
        save_adapter(layers, scratch, recipe.rank, recipe.alpha, base_name)
        (scratch / "training.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        os.replace(scratch, folder)
        checkpoint.unlink(missing_ok=True)
    finally:
        detach(model, layers)


def _optimise(
    name: str,
    model: Any,
    layers: dict[str, LoraLinear],
    data: Sequence[Encoded],
    prefix: list[int],
    checkpoint: Path,
    recipe: Recipe,
    progress: Progress,
) -> None:
    parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    start = _resume(checkpoint, parameters, optimiser)
    task = progress.add_task(name, total=recipe.steps, completed=start)
    running = 0.0
    model.train()
    for step, batch in enumerate(batches(data, recipe)):
        if step < start:
            continue
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe)
        loss = answer_loss(model, prefix, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        running = loss.item() if step == start else 0.95 * running + 0.05 * loss.item()
        progress.update(task, advance=1, description=f"{name} loss {running:.3f}")
        if (step + 1) % recipe.checkpoint_every == 0:
            _save_checkpoint(checkpoint, step + 1, parameters, optimiser)
    model.eval()


def answer_loss(model: Any, prefix: list[int], batch: Batch) -> Tensor:
    """Mean cross-entropy over answer tokens.

    The prefix runs as one row; its cache is repeated over the batch. Rows are
    padded on the right, where causal attention makes a padding mask needless.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    model.model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(batch.ids))
    hidden = model.model(input_ids=batch.ids, past_key_values=cache, use_cache=True)[0]
    wanted = batch.targets != IGNORE
    logits = model.lm_head(hidden[wanted]).float()
    return nn.functional.cross_entropy(logits, batch.targets[wanted])


def schedule(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, then cosine to a twentieth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def batches(data: Sequence[Encoded], recipe: Recipe) -> Iterator[Batch]:
    """Exactly `steps` batches, the same for the same seed: epochs reshuffled, lengths bucketed."""
    rng = random.Random(recipe.seed)  # noqa: S311 - a shuffle, not a secret
    produced = 0
    while True:
        order = list(range(len(data)))
        rng.shuffle(order)
        window = 16 * recipe.batch
        for start in range(0, len(order), window):
            bucket = sorted(
                order[start : start + window],
                key=lambda i: len(data[i].suffix) + len(data[i].answer),
            )
            groups = [bucket[i : i + recipe.batch] for i in range(0, len(bucket), recipe.batch)]
            rng.shuffle(groups)
            for group in groups:
                if produced == recipe.steps:
                    return
                produced += 1
                yield collate([data[i] for i in group])


def collate(rows: Sequence[Encoded]) -> Batch:
    """Pad on the right; position i of `targets` is the token that i must predict."""
    length = max(len(row.suffix) + len(row.answer) for row in rows) - 1
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), IGNORE, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.suffix + row.answer)
        ids[i, : len(tokens) - 1] = tokens[:-1]
        first = len(row.suffix) - 1
        targets[i, first : first + len(row.answer)] = torch.tensor(row.answer)
    return Batch(ids=ids, targets=targets)


def _save_checkpoint(
    path: Path, step: int, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """Write factors and Adam's two moments as safetensors, atomically."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.value"] = parameter.detach()
        tensors[f"{i}.exp_avg"] = optimiser.state[parameter]["exp_avg"]
        tensors[f"{i}.exp_avg_sq"] = optimiser.state[parameter]["exp_avg_sq"]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    save_file(tensors, scratch)
    os.replace(scratch, path)


def _resume(path: Path, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """Restore the last checkpoint, if there is one; return the step to go on from."""
    if not path.is_file():
        return 0
    saved = load_file(path)
    step = int(saved["step"].item())
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(saved[f"{i}.value"])
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": saved[f"{i}.exp_avg"],
                "exp_avg_sq": saved[f"{i}.exp_avg_sq"],
            }
    return step
