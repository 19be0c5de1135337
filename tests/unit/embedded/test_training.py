"""Promises of training, on a Llama of a few thousand parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from experts.embedded.chat import Encoded
from experts.embedded.family import family
from experts.embedded.lora import attach, detach, load_adapter, save_adapter
from experts.embedded.train import (
    IGNORE,
    Recipe,
    _optimise,
    answer_loss,
    batches,
    collate,
    schedule,
    shipped_recipe,
)

PREFIX = [1, 5, 6]
DATA = [Encoded(suffix=[7 + i % 5, 3], answer=[20 + i % 5, 2]) for i in range(64)]


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def test_targets_are_the_answer_tokens_alone() -> None:
    batch = collate([Encoded([9, 3], [20, 2]), Encoded([9], [21, 22, 2])])
    assert batch.ids.tolist() == [[9, 3, 20], [9, 21, 22]]
    assert batch.targets.tolist() == [[IGNORE, 20, 2], [21, 22, 2]]


def test_sharing_the_prefix_is_exact_gradients_included() -> None:
    model = tiny_llama()
    layers = attach(model, rank=2, alpha=4, seed=1)
    batch = collate(DATA[:4])
    answer_loss(model, PREFIX, batch).backward()
    shared = {name: layer.b.grad.clone() for name, layer in layers.items() if layer.b.grad is not None}
    model.zero_grad()

    rows = torch.cat([torch.tensor([PREFIX]).expand(4, -1), batch.ids], dim=1)
    logits = model(input_ids=rows).logits[:, len(PREFIX) :]
    wanted = batch.targets != IGNORE
    torch.nn.functional.cross_entropy(logits[wanted], batch.targets[wanted]).backward()
    assert len(shared) == len(layers) == 14
    for name, layer in layers.items():
        torch.testing.assert_close(layer.b.grad, shared[name], rtol=1e-4, atol=1e-6)


def test_batches_are_seeded_and_exactly_as_many_as_steps() -> None:
    recipe = Recipe(steps=7, batch=16)
    first, second = list(batches(DATA, recipe)), list(batches(DATA, recipe))
    assert len(first) == 7
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, second, strict=True))


def test_the_learning_rate_warms_up_and_decays() -> None:
    recipe = Recipe(steps=100, warmup=10)
    rates = [schedule(step, recipe) for step in range(100)]
    assert rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


class Killed(Exception):
    """Stands for a power cut."""


class KilledAt(Progress):
    """A progress bar that cuts the power after so many updates."""

    left = 10**9

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed
        super().update(*args, **kwargs)


def test_a_run_killed_half_way_ends_with_the_same_factors(tmp_path: Path) -> None:
    recipe = Recipe(rank=2, steps=9, batch=8, warmup=2, checkpoint_every=3)

    def run(checkpoint: Path, updates: int) -> dict[str, torch.Tensor]:
        model = tiny_llama()
        layers = attach(model, recipe.rank, recipe.alpha, recipe.seed)
        progress = KilledAt(disable=True)
        progress.left = updates
        _optimise("toy", model, layers, DATA, PREFIX, checkpoint, recipe, progress)
        return {name: layer.b.detach() for name, layer in layers.items()}

    whole = run(tmp_path / "whole.safetensors", 9)
    with pytest.raises(Killed):
        run(tmp_path / "cut.safetensors", 5)
    resumed = run(tmp_path / "cut.safetensors", 6)
    assert any(factor.abs().sum() > 0 for factor in whole.values())
    for name, factor in whole.items():
        assert torch.equal(factor, resumed[name])


def test_an_adapter_comes_back_as_saved_and_detaching_restores_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        plain = model(ids).logits
        layers = attach(model, rank=2, alpha=4, seed=1)
        for layer in layers.values():
            layer.b.normal_(generator=torch.Generator().manual_seed(3))
            layer.a.copy_(layer.a.bfloat16())
            layer.b.copy_(layer.b.bfloat16())
        tuned = model(ids).logits
        save_adapter(layers, tmp_path, rank=2, alpha=4)
        detach(model, layers)
        assert torch.equal(model(ids).logits, plain)
        again = attach(model, rank=2, alpha=4, seed=9)
        load_adapter(again, tmp_path)
        torch.testing.assert_close(model(ids).logits, tuned)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_opens_the_saved_folder_and_gives_the_same_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        layers = attach(model, rank=2, alpha=4, seed=1)
        for layer in layers.values():
            layer.a.copy_(layer.a.bfloat16())
            layer.b.normal_().copy_(layer.b.bfloat16())
        tuned = model(ids).logits
        save_adapter(layers, tmp_path, rank=2, alpha=4)
        detach(model, layers)
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path).eval()
        torch.testing.assert_close(wrapped(ids).logits, tuned, rtol=1e-4, atol=1e-5)


def test_every_shipped_expert_says_how_to_train_it_again():
    for skill in family():
        recipe = shipped_recipe(skill.name)
        assert recipe.rank == 4
        assert recipe.steps in (160, 200)
    assert shipped_recipe("no-such-skill") == Recipe()
