"""An expert as a GGUF LoRA for llama.cpp, over the shared expert converted with its own converter.

llama.cpp scales by alpha / rank of each tensor, so every pair is padded with zeros to one rank and alpha is that
rank: the scaling is 1, also for programs that divide by zero alpha.
"""

from pathlib import Path

import torch

from experts.bundle_expert import ExpertWeights
from experts.checkpoint import Checkpoint
from experts.checkpoint.gguf_names import GgufNames
from experts.checkpoint.mark import MARK_KEY, SharedMark
from experts.compression.kinds import tensor_kind
from experts.errors import ExportError
from experts.factors import LowRank
from experts.registry.exporting.factors import exactly, products


def write_gguf(shared: Checkpoint, expert: ExpertWeights, mark: SharedMark, path: Path) -> None:
    """Write one adapter file, float32.

    Args:
        shared: the shared expert; a Llama-like model.
        expert: one generation.
        mark: of that shared expert.
        path: the file.

    Raises:
        ExportError: llama.cpp's layout of this architecture is not known here, or the form cannot hold what the
            expert changes: biases, norms, a tied embedding; names it.
    """
    if not GgufNames.supported(shared.config):
        raise ExportError(
            f"a {shared.config.get('model_type')} cannot be exported as GGUF: its layout in llama.cpp is not known "
            "here; export as peft and convert that"
        )
    if expert.exact:
        some = ", ".join(sorted(expert.exact)[:3])
        raise ExportError(
            f"expert {expert.name!r} changes {len(expert.exact)} biases and norms ({some}, …), which a LoRA for "
            "llama.cpp cannot hold; export as peft or as a merged model"
        )
    names = GgufNames(shared)
    found = products(expert)
    if not found:
        raise ExportError(f"expert {expert.name!r} differs in nothing from the shared expert")
    rank = max(product.rank for product in found.values())
    pairs: dict[str, LowRank] = {}
    for name, product in found.items():
        stem = names.by_parameter.get(name)
        if stem is None or (name == shared.embedding and shared.ties_head):
            raise ExportError(
                f"expert {expert.name!r} changes {name}, which a LoRA for llama.cpp cannot hold in this model; "
                "export as peft or as a merged model"
            )
        padded = _padded(product, rank)
        if (
            tensor_kind(name, product.shape) == "embedding"
        ):  # looked up by token: A (vocabulary, k), B (hidden, k)
            pairs[stem] = LowRank(padded.down.T, padded.up)
        else:
            pairs[stem] = LowRank(names.to_pairs(name, padded.up), padded.down)
    _write(path, names.architecture, expert, mark, rank, pairs)


def _write(
    path: Path,
    architecture: str,
    expert: ExpertWeights,
    mark: SharedMark,
    rank: int,
    pairs: dict[str, LowRank],
) -> None:
    """`pairs`: llama.cpp's name → B as `up` and A as `down`, as they are stored."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_name(f"{expert.name}@{expert.generation} over {mark.bundle}")
        writer.add_string(MARK_KEY, str(mark))
        for key, text in exactly(expert).texts().items():
            writer.add_string(key, text)
        for stem, pair in pairs.items():
            writer.add_tensor(f"{stem}.lora_a", pair.down.contiguous().numpy())
            writer.add_tensor(f"{stem}.lora_b", pair.up.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _padded(product: LowRank, rank: int) -> LowRank:
    rows, columns = product.shape
    up, down = torch.zeros(rows, rank), torch.zeros(rank, columns)
    up[:, : product.rank], down[: product.rank] = product.up, product.down
    return LowRank(up, down)
