"""LoRA factors for training, saved in PEFT's folder layout.

`peft` itself is not needed: the layer is five lines, and this way the factors
stay fp32 while the frozen base runs in bf16.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """y = W x + scaling · B (A x): W frozen, A (rank × in) and B (out × rank) trained in fp32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in) → (…, out)."""
        low = nn.functional.linear(x, self.a.to(x.dtype))
        update = nn.functional.linear(low, (self.b * self.scaling).to(x.dtype))
        return torch.add(self.base(x), update)


def attach(model: nn.Module, rank: int, alpha: float, seed: int) -> dict[str, LoraLinear]:
    """Freeze the model and wrap every target linear; returns module name → LoRA layer."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    ]
    layers: dict[str, LoraLinear] = {}
    for name, module in found:
        parent, _, leaf = name.rpartition(".")
        layers[name] = LoraLinear(module, rank, alpha, generator)
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers


def detach(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """Put the plain linears back."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


def save_adapter(
    layers: dict[str, LoraLinear], folder: Path, rank: int, alpha: float, base: str = EMBEDDED
) -> None:
    """Write `adapter_model.safetensors` in bf16 (the precision of the forward pass) and its config.

    Shapes are PEFT's: lora_A (rank, in), lora_B (out, rank), unscaled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = layer.a.detach().to(torch.bfloat16).contiguous()
        tensors[f"{stem}.lora_B.weight"] = layer.b.detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(layers: dict[str, LoraLinear], folder: Path) -> None:
    """Copy the saved factors into attached layers."""
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, layer in layers.items():
            stem = f"base_model.model.{name}"
            layer.a.copy_(tensors[f"{stem}.lora_A.weight"])
            layer.b.copy_(tensors[f"{stem}.lora_B.weight"])
