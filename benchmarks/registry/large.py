"""Fine-tunes of a bundle's size, made on the spot: a LoRA of rank 16, and a full one with every matrix moved."""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

LORA_RANK = 16
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_lora(folder: Path, shared: Path, seed: int) -> Path:
    """A PEFT LoRA on every linear layer of the shared model's architecture; float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in _weights(shared).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in _TARGETS:
            rows, columns = weight.shape
            scale = 0.02 * weight.float().norm() / (rows * columns) ** 0.5
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(LORA_RANK, columns, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, LORA_RANK, generator=generator) * scale
    folder.mkdir(parents=True)
    config = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(_TARGETS), task_type="CAUSAL_LM"
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def make_full(folder: Path, shared: Path, seed: int) -> Path:
    """A model folder like the shared one, every parameter of it moved at random by a hundredth of its size."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, weight in _weights(shared).items():
        noise = torch.randn(weight.shape, generator=generator) * weight.float().std() * 0.01
        moved[name] = (weight.float() + noise).to(weight.dtype)
    shutil.copytree(shared, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
