"""Write a merged change as a LoRA adapter of one rank (PEFT's folder format; LoRA: arXiv 2106.09685)."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from experts.checkpoint import Checkpoint
from experts.errors import MergeError
from experts.factors import Delta, LowRank
from experts.merging.spectrum import spectrum


def lora_factors(delta: Delta, rank: int) -> LowRank:
    """The best approximation of a matrix of that rank, in Frobenius norm; exact where its own rank fits.

    Args:
        delta: (rows, columns), finite.
        rank: inner dimension of the result, padded with zeros where the matrix has less.

    Returns:
        up (rows, rank) and down (rank, columns), float32; the singular values are shared out evenly.
    """
    rows, columns = delta.shape
    if not (isinstance(delta, LowRank) and delta.rank <= rank):
        found = spectrum(delta).leading(rank)
        root = found.values.sqrt()
        delta = LowRank((found.left * root).float(), (found.right * root[:, None]).float())
    up, down = torch.zeros(rows, rank), torch.zeros(rank, columns)
    up[:, : delta.rank], down[: delta.rank] = delta.up, delta.down
    return LowRank(up, down)


def write_lora(base: Checkpoint, deltas: Iterable[tuple[str, Delta | None]], folder: Path, rank: int) -> None:
    """Write the merged change as an adapter of the base; it is exact when `rank` is the sum of the ranks.

    Args:
        base: θ₀, for the orientation of its weights.
        deltas: from `merge`.
        folder: made if need be; must not hold an adapter yet.
        rank: of every module.

    Raises:
        MergeError: a parameter changes that an adapter of linear layers cannot hold, a bias, norm or
            embedding, nothing changes, the rank is below 1, or the folder holds an adapter.
    """
    if rank < 1:
        raise MergeError(f"a LoRA of rank {rank} holds nothing; give a rank of at least 1")
    target = folder / "adapter_model.safetensors"
    if target.exists():
        raise MergeError(f"{target} is there already; choose another folder")
    tensors: dict[str, torch.Tensor] = {}
    modules: list[str] = []
    for name, delta in deltas:
        if delta is None:
            continue
        module = name.removesuffix(".weight")
        if len(delta.shape) != 2 or name == base.embedding or module == name:
            raise MergeError(
                f"{name} changes, which a LoRA of linear layers cannot hold; write a merged model instead"
            )
        factors = lora_factors(delta, rank)
        if base.config.get("model_type") == "gpt2":  # stored (in, out)
            factors = LowRank(factors.down.T, factors.up.T)
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.down.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.up.contiguous()
        modules.append(module)
    if not modules:
        raise MergeError("nothing changes, so there is no LoRA to write")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": base.config.get("model_type") == "gpt2",
        "target_modules": modules,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, target)
