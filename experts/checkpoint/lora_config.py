"""What an adapter_config.json says, reduced to what the product needs; everything else is refused by name."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint.model import refuse_remote_code
from experts.checkpoint.storage import read_json
from experts.errors import CheckpointError

_CHANGES_NOTHING = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
        "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout",
        "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
    }
)  # fmt: skip
"""Fields about training or loading: what they did to the weights is seen in the tensors themselves."""

_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also subtract from the base's weights, so that B·A alone is not θ_t − θ₀."""

_MAX_PATTERN = 256

ByPattern = tuple[tuple[re.Pattern[str], float], ...]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields that decide the product.

    Attributes:
        default_rank: of the modules that no pattern in `ranks` matches.
        ranks: pattern over module names → rank of its own, in order.
        alpha: numerator of the scaling, unless a pattern in `alphas` matches.
        rank_stabilised: scaling is alpha/√r rather than alpha/r.
        alphas: pattern over module names → alpha of its own, in order.
        transposed: config's fan_in_fan_out: weights are stored (in, out).
        ties_head: the adapter trained embedding and output head as one.
    """

    default_rank: float
    ranks: ByPattern
    alpha: float
    rank_stabilised: bool
    alphas: ByPattern
    transposed: bool
    ties_head: bool

    def rank(self, module: str) -> float:
        """The rank that one module's factors must have."""
        return _first_match(self.ranks, module, self.default_rank)

    def scaling(self, module: str, rank: int) -> float:
        """The factor on B·A for one module of that rank."""
        alpha = _first_match(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def read_lora_config(folder: Path) -> LoraConfig:
    """Read and check `folder`/adapter_config.json.

    Raises:
        CheckpointError: not a LoRA, a variant that is not a plain product, or a value that makes no sense.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    refuse_remote_code(folder)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} has peft_type {config.get('peft_type')!r}; only LORA can be used")
    for name, value in config.items():
        if value and name not in _CHANGES_NOTHING and name not in _READ:
            raise CheckpointError(
                f"{path} sets {name}, so its change is not the plain product B·A·scaling; "
                "merge the adapter into the model and give the full fine-tune instead"
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path} has init_lora_weights {start!r}, which changes the base's weights too; save it with "
            "path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
        )
    return LoraConfig(
        default_rank=_number(path, "r", config.get("r", 8)),
        alpha=_number(path, "lora_alpha", config.get("lora_alpha", 8)),
        rank_stabilised=_flag(path, "use_rslora", config.get("use_rslora", False)),
        ranks=_by_pattern(path, "rank_pattern", config.get("rank_pattern")),
        alphas=_by_pattern(path, "alpha_pattern", config.get("alpha_pattern")),
        transposed=_flag(path, "fan_in_fan_out", config.get("fan_in_fan_out", False)),
        ties_head=_flag(path, "ensure_weight_tying", config.get("ensure_weight_tying", False)),
    )


def _first_match(by_pattern: ByPattern, module: str, default: float) -> float:
    return next((value for pattern, value in by_pattern if pattern.match(module)), default)


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {name} is {value!r}, expected a finite number")
    return float(value)


def _flag(path: Path, name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {name} is {value!r}, expected true or false")
    return bool(value)


def _by_pattern(path: Path, name: str, value: Any) -> ByPattern:
    if not isinstance(value or {}, dict):
        raise CheckpointError(f"{path}: {name} is {value!r}, expected an object")
    return tuple(
        (_pattern(path, name, key), _number(path, f"{name}[{key!r}]", number))
        for key, number in (value or {}).items()
    )


def _pattern(path: Path, field: str, key: str) -> re.Pattern[str]:
    """PEFT's rule: the key is a regular expression for the end of the module's name.

    It comes from an uploaded file, so forms that can backtrack without end are refused.
    """
    repeats = len(re.findall(r"[*+{]", key))
    if len(key) > _MAX_PATTERN or repeats > 2 or re.search(r"\)\s*[*+{?]|\\\d|\(\?", key):
        raise CheckpointError(f"{path}: {field} key {key!r} is too intricate; write plain module names")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise CheckpointError(f"{path}: {field} key {key!r} is no regular expression: {error}") from error
