"""A weaker base: the embedded one without its least influential decoder layers.

The influence of a layer is 1 - the cosine of its input and output hidden states,
averaged over tokens (block influence of ShortGPT, arXiv 2403.03853). All layers
are measured once, in the whole model.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experts.embedded.base import ensure_base
from experts.embedded.chat import chat_text
from experts.embedded.family import family
from experts.errors import CheckpointError

LAYERS_REMOVED = 3
PROMPTS_PER_SKILL = 6


def ensure_weaker(folder: Path, work: Path, removed: int = LAYERS_REMOVED) -> Path:
    """Return `folder` holding the weaker base as an ordinary HF model, making it if needed.

    Written beside `folder` and renamed, so a reader never sees half of it.
    """
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = ensure_base(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    texts = [
        chat_text(tokenizer, example.prompt)
        for skill in family()
        for example in skill.load("train", work / "downloads")[:PROMPTS_PER_SKILL]
    ]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    remove_layers(model, least_influential(layer_influence(model, rows), removed))
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        os.replace(scratch, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # another process may have won the race
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def layer_influence(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """Influence of every decoder layer, averaged over all tokens of the rows (token ids)."""
    layers = model.model.layers
    totals = [0.0] * len(layers)

    def watcher(place: int) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            totals[place] += float((1 - cosine).sum())

        return add

    hooks = [layer.register_forward_hook(watcher(place)) for place, layer in enumerate(layers)]
    try:
        with torch.inference_mode():
            for row in rows:
                model(input_ids=torch.tensor([list(row)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(row) for row in rows)
    return [total / tokens for total in totals]


def least_influential(influence: Sequence[float], count: int) -> list[int]:
    """Places of the `count` least influential layers, in ascending order."""
    if not 0 < count < len(influence):
        raise CheckpointError(f"cannot remove {count} of {len(influence)} layers")
    return sorted(sorted(range(len(influence)), key=lambda place: influence[place])[:count])


def remove_layers(model: Any, places: Sequence[int]) -> None:
    """Take decoder layers out in place; the rest are numbered again, as their caches need."""
    kept = [layer for place, layer in enumerate(model.model.layers) if place not in places]
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
