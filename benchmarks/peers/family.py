"""The family that every peer serves: an 82M random Llama in bfloat16 and eight LoRAs of rank 16 over it.

Random weights: only speed is compared with it. The tokenizer is that of the embedded base, so that servers
that insist on one have it. The twinserve bundle's shared expert is the base itself (λ so small that bfloat16
rounds it away), hence its exclusive vectors have exactly the LoRAs' rank and all peers compute the same model.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from experts.build import BuildPlan, build_bundle
from experts.compression import CompressionSpec
from experts.merging.methods import TaskArithmetic

WORK = Path(".twinserve/peers")
TOKENIZER = Path(".twinserve/bundle/shared")
ADAPTERS = tuple(f"lora{index}" for index in range(8))
RANK = 16
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 12, 768, 928, 12, 4
VOCABULARY = 49152

_SEED = 20240611
_RELATIVE_SIZE = 0.1
_NO_MERGE = 1e-9
_TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")
_KEY = "base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """Where the family lies. Other forms of it (GGUF, OpenVINO) are made beside it by the peers that need them.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def base(self) -> Path:
        """The base as a Hugging Face folder."""
        return self.path / "base"

    @property
    def bundle(self) -> Path:
        """The twinserve bundle: the base as shared expert, the LoRAs as experts."""
        return self.path / "bundle"

    def adapter(self, name: str) -> Path:
        """One LoRA as a PEFT folder."""
        return self.path / "adapters" / name


def ensure_family(work: Path = WORK, tokenizer: Path = TOKENIZER) -> Family:
    """Make what is missing of the family below `work`; half-made parts are never seen.

    Args:
        work: the folder of all that the peers need.
        tokenizer: a Hugging Face folder with a tokenizer of at most `VOCABULARY` tokens.
    """
    family = Family(work.resolve() / "family")
    once(family.base, lambda folder: _write_base(folder, tokenizer))
    for index, name in enumerate(ADAPTERS):
        once(family.adapter(name), lambda folder, seed=index + 1: _write_adapter(folder, _SEED + seed))  # type: ignore[misc]
    if not family.bundle.exists():
        build_bundle(_plan(family))
    return family


def once(target: Path, write: Callable[[Path], None]) -> Path:
    """A folder that `write` fills if it is not there: beside its place, then moved in whole."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(scratch)
        scratch.chmod(0o755)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def linears() -> dict[str, tuple[int, int]]:
    """(out, in) of every linear module of one layer."""
    head = HIDDEN // HEADS
    return {
        "self_attn.q_proj": (HEADS * head, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * head),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }


def _write_base(folder: Path, tokenizer: Path) -> None:
    torch.manual_seed(_SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    # A class that older transformers know too: some peers bring one.
    described = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _write_adapter(folder: Path, seed: int) -> None:
    """Random factors whose product is a tenth of a base matrix in norm, with 16 singular values alike."""
    generator = torch.Generator().manual_seed(seed)
    scale = _RELATIVE_SIZE * LlamaConfig().initializer_range / RANK**0.5
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in linears().items():
            down = torch.randn(RANK, columns, generator=generator)
            up = torch.randn(rows, RANK, generator=generator) * scale
            tensors[_KEY.format(layer=layer, module=module, side="A")] = down.to(torch.bfloat16)
            tensors[_KEY.format(layer=layer, module=module, side="B")] = up.to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(module.split(".")[1] for module in linears()),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _plan(family: Family) -> BuildPlan:
    return BuildPlan(
        base=family.base,
        experts={name: family.adapter(name) for name in ADAPTERS},
        out=family.bundle,
        name="peers",
        method=TaskArithmetic(scale=_NO_MERGE),
        compression=CompressionSpec(rank=RANK),
        router="none",
    )


def main() -> None:
    """Make the family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    arguments = parser.parse_args()
    print(ensure_family(arguments.work, arguments.tokenizer).path)


if __name__ == "__main__":
    main()
