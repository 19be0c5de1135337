"""Choose a merge's scale λ by what the finished family would say: Twin with oracle gates, on validation.

For each λ of the grid and each expert t, the model W* + SVD(v_t) is made as it would be served with gate 1 on
t, and scored by its mean loss per answer token (nats, end-of-sequence included) on t's validation prompts.
The λ with the lowest mean over the experts wins, the smaller one on a tie. With an uncompressed v_t every λ
would be equal; what is measured is how well the exclusive vector survives compression at that λ.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experts.bundle_manifest import TuningPoint, TuningRecord
from experts.checkpoint import Checkpoint, FineTune
from experts.compression import CompressedExpert, CompressionSpec, compress, exclusive_delta
from experts.errors import MergeError, MismatchError
from experts.factors import Delta, dense
from experts.merging import MergeCache, merge
from experts.merging.methods import Averaging, MergeMethod, ModelStock
from experts.routing import RoutingPrompt, prompt_forms
from experts.routing.loading import load_model, load_tokenizer
from experts.routing.prompts import render_chat

SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
MAX_PROMPTS = 48
"""Validation prompts of each expert that are scored."""
_BATCH = 8

Answered = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""


def tune_scale(
    base: Checkpoint,
    fine_tunes: Sequence[FineTune],
    method: MergeMethod,
    spec: CompressionSpec,
    prompts: Mapping[str, Sequence[RoutingPrompt]],
    progress: Callable[[str, int, int], None],
    scales: Sequence[float] = SCALES,
) -> tuple[MergeMethod, TuningRecord]:
    """The method at its best scale, and the score of every scale. Holds one model and one merge in memory.

    Raises:
        MergeError: the method has no scale, or an expert has no validation prompt with an answer.
    """
    if isinstance(method, Averaging | ModelStock):
        raise MergeError(f"{method.method} has no scale to tune; choose another method or do not tune")
    tokenizer = load_tokenizer(base.path)
    answered = {tune.name: _answered(tokenizer, tune.name, prompts.get(tune.name, ())) for tune in fine_tunes}
    model = load_model(base.path)
    places = _places(model, base)
    points = []
    cache = MergeCache(keep_products=False)
    for index, scale in enumerate(scales):
        candidate = method.model_copy(update={"scale": scale})
        merged = dict(merge(base, fine_tunes, candidate, cache=cache))
        losses = {}
        for position, tune in enumerate(fine_tunes):
            progress("tune", index * len(fine_tunes) + position, len(scales) * len(fine_tunes))
            exclusive = compress(_exclusive(base, tune, merged), spec)
            _materialise(places, base, merged, exclusive)
            losses[tune.name] = answer_loss(model, answered[tune.name])
        points.append(TuningPoint(scale=scale, loss=sum(losses.values()) / len(losses), by_expert=losses))
    progress("tune", len(scales) * len(fine_tunes), len(scales) * len(fine_tunes))
    best = min(points, key=lambda point: (point.loss, point.scale))
    return method.model_copy(update={"scale": best.scale}), TuningRecord(grid=tuple(points))


@torch.inference_mode()
def answer_loss(model: nn.Module, answered: Sequence[Answered]) -> float:
    """Mean negative log-likelihood per answer token, nats."""
    total, count = 0.0, 0
    for start in range(0, len(answered), _BATCH):
        batch = answered[start : start + _BATCH]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        # Right padding needs no mask: attention is causal, and padding carries no label.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].to(torch.float32)
        total += float(
            functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        )
        count += int((labels != -100).sum())
    return total / count


def _answered(tokenizer: Any, name: str, prompts: Sequence[RoutingPrompt]) -> list[Answered]:
    """Token ids of the validation prompts that have answers, in the chat form where there is one."""
    chosen = [p for p in prompts if p.side == "validation" and p.answer][:MAX_PROMPTS]
    if not chosen:
        raise MergeError(f"tuning needs validation prompts with answers, and expert {name!r} has none")
    chat = "chat" in prompt_forms(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answered = []
    for p in chosen:
        prompt = render_chat(tokenizer, p.prompt) if chat else list(tokenizer(p.prompt)["input_ids"])
        answered.append((prompt, [*tokenizer(p.answer, add_special_tokens=False)["input_ids"], *end]))
    return answered


def _exclusive(
    base: Checkpoint, fine_tune: FineTune, merged: Mapping[str, Delta | None]
) -> Iterable[tuple[str, Delta]]:
    for name in base.names:
        delta = exclusive_delta(fine_tune.delta(name), merged[name])
        if delta is not None:
            yield name, delta


def _places(model: nn.Module, base: Checkpoint) -> dict[str, Tensor]:
    """Checkpoint name → the model's parameter, whether or not the checkpoint has the model's prefix."""
    parameters = dict(model.named_parameters())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    places: dict[str, Tensor] = {}
    for name in base.names:
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in parameters:
                places[name] = parameters[candidate]
                break
        else:
            raise MismatchError(
                f"{base.path}: {name} is not a parameter of {type(model).__name__}; cannot tune"
            )
    return places


@torch.no_grad()
def _materialise(
    places: Mapping[str, Tensor],
    base: Checkpoint,
    merged: Mapping[str, Delta | None],
    exclusive: CompressedExpert,
) -> None:
    """Write W* + SVD(v_t) into the model, W* rounded to the stored dtype as it would be on disk."""
    for name, place in places.items():
        weight = base.tensor(name).to(torch.float32)
        change = merged[name]
        if change is not None:
            weight = (weight + dense(change)).to(base.dtype(name)).to(torch.float32)
        if name in exclusive.factors:
            weight = weight + exclusive.factors[name].dense()
        elif name in exclusive.exact:
            weight = weight + exclusive.exact[name]
        place.copy_(weight)
