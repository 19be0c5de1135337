"""Tiny model and adapter folders in Hugging Face's and PEFT's layout, written without either library."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY, HIDDEN, INNER = 12, 6, 10
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
UP_BIAS = "model.layers.0.mlp.up_proj.bias"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

SHAPES: dict[str, tuple[int, ...]] = {
    EMBEDDING: (VOCABULARY, HIDDEN),
    Q: (HIDDEN, HIDDEN),
    UP: (INNER, HIDDEN),
    UP_BIAS: (INNER,),
    DOWN: (HIDDEN, INNER),
    NORM: (HIDDEN,),
    HEAD: (VOCABULARY, HIDDEN),
}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def random_weights(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def near(weights: dict[str, Tensor], seed: int, size: float = 0.1) -> dict[str, Tensor]:
    """The weights with a little added to each: a full fine-tune."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return {name: weights[name] + size * change for name, change in random_weights(seed, shapes).items()}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_model(path: Path, weights: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", {**CONFIG, **config})
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_lora(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter folder; tensor names are without PEFT's prefix."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config})
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
    return path


def lora_factors(
    name: str, seed: int, rank: int = 2, shape: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A and B of one linear weight."""
    generator = torch.Generator().manual_seed(seed)
    out, into = shape or SHAPES[name]
    module = name.removesuffix(".weight")
    return {
        f"{module}.lora_A.weight": torch.randn(rank, into, generator=generator),
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }
