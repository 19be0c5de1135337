"""An expert as a PEFT LoRA over the shared expert: B·A is its exclusive vector, exactly.

B is U·diag(S) and A is Vh, both float32, each module with its own rank and an alpha equal to it, so that PEFT's
scaling is 1. Where norms differ, their modules are saved whole; biases of linear layers are, too (PEFT's
``modules_to_save`` and ``bias="all"``). A tied embedding changes together with its head (``ensure_weight_tying``).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from experts.bundle_expert import ExpertWeights
from experts.checkpoint import Checkpoint
from experts.checkpoint.mark import MARK_KEY, SharedMark
from experts.compression.kinds import tensor_kind
from experts.errors import ExportError
from experts.factors import LowRank
from experts.registry.exporting.factors import exactly, products

_PREFIX = "base_model.model."
_CONV1D = frozenset({"gpt2"})
"""Model types whose linear weights are stored (in, out)."""


def write_peft(shared: Checkpoint, expert: ExpertWeights, mark: SharedMark, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing empty folder.

    Args:
        shared: the shared expert, over which the adapter is.
        expert: one generation.
        mark: of that shared expert; the adapter's `base_model_name_or_path`.
        folder: where to.

    Raises:
        ExportError: the expert changes nothing, or a part of the model that PEFT has no means for; names it.
    """
    adapter = _Adapter(shared)
    for name, product in products(expert).items():
        adapter.add_product(name, product)
    for name, vector in expert.exact.items():
        adapter.add_vector(name, vector)
    if not adapter.tensors:
        raise ExportError(
            f"expert {expert.name!r} differs in nothing from the shared expert; export a merged model instead"
        )
    save_file(
        adapter.tensors,
        folder / "adapter_model.safetensors",
        metadata={"format": "pt", MARK_KEY: str(mark), **exactly(expert).texts()},
    )
    config = json.dumps(adapter.config(str(mark)), indent=1) + "\n"
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")


class _Adapter:
    """An adapter in the making."""

    def __init__(self, shared: Checkpoint) -> None:
        self._shared = shared
        self._transposed = shared.config.get("model_type") in _CONV1D
        self._ranks: dict[str, int] = {}
        self._whole: set[str] = set()
        self._biases = False
        self._tied = False
        self.tensors: dict[str, Tensor] = {}

    def add_product(self, name: str, product: LowRank) -> None:
        """The factors of one matrix, (rows, columns) as the checkpoint stores it."""
        module = name.removesuffix(".weight")
        kind = tensor_kind(name, product.shape)
        if module == name:
            raise ExportError(
                f"{name} is no module's weight, which PEFT needs; export a merged model instead"
            )
        self._ranks[module] = product.rank
        if kind == "embedding":
            self._keep(f"{module}.lora_embedding_A", product.up.T)
            self._keep(f"{module}.lora_embedding_B", product.down.T)
            if name == self._shared.embedding and self._shared.ties_head:
                # The head is the embedding's transpose, and PEFT saves its share of the change under its own name.
                self._tied = True
                self._ranks["lm_head"] = product.rank
                self._keep("lm_head.lora_A.weight", product.down)
                self._keep("lm_head.lora_B.weight", product.up)
            return
        linear = LowRank(product.down.T, product.up.T) if self._transposed and kind == "linear" else product
        self._keep(f"{module}.lora_A.weight", linear.down)
        self._keep(f"{module}.lora_B.weight", linear.up)

    def add_vector(self, name: str, vector: Tensor) -> None:
        """The exact change of a bias or norm."""
        module, _, leaf = name.rpartition(".")
        weight = f"{module}.weight"
        if leaf == "bias" and weight in self._shared and len(self._shared.shape(weight)) == 2:
            self._biases = True
            wrapped = "base_layer." if module in self._ranks else ""
            self._keep(f"{module}.{wrapped}bias", self._sum(name, vector))
            return
        if module in self._whole:
            self._keep(name, self._sum(name, vector))
            return
        self._whole.add(module)
        for part in ("weight", "bias"):  # PEFT saves and loads the module as a whole
            parameter = f"{module}.{part}"
            if parameter in self._shared:
                own = vector if parameter == name else torch.zeros(self._shared.shape(parameter))
                self._keep(parameter, self._sum(parameter, own))

    def _sum(self, name: str, vector: Tensor) -> Tensor:
        """θ* + Δ, float32."""
        return self._shared.tensor(name).to(torch.float32) + vector

    def _keep(self, key: str, tensor: Tensor) -> None:
        # A tied head's factors would share memory with the embedding's, which safetensors refuses.
        self.tensors[_PREFIX + key] = tensor.clone(memory_format=torch.contiguous_format)

    def config(self, base: str) -> dict[str, Any]:
        """adapter_config.json. Patterns are anchored: PEFT matches them at the end of a module's name."""
        rank = max(self._ranks.values(), default=1)
        own = {re.escape(name): found for name, found in self._ranks.items() if found != rank}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": own,
            "alpha_pattern": own,
            "lora_dropout": 0.0,
            "bias": "all" if self._biases else "none",
            "fan_in_fan_out": self._transposed,
            "target_modules": sorted(self._ranks),
            "modules_to_save": sorted(self._whole) or None,
            "ensure_weight_tying": self._tied,
            "inference_mode": True,
        }
