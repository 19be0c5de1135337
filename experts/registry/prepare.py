"""A fine-tune → a compressed expert of one bundle. Writes nothing, so it can run in any process."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from experts.bundle import Bundle
from experts.bundle_delta import BaseDelta
from experts.bundle_files import digest
from experts.bundle_manifest import EXPERT_FILES, ExpertSource, check_name
from experts.checkpoint import Checkpoint, FineTune
from experts.checkpoint.gguf_file import find_gguf
from experts.checkpoint.storage import find_weights
from experts.compression import CompressedExpert, CompressionSpec, compress, exclusive_delta
from experts.factors import Delta
from experts.registry.calibration import expert_statistics
from experts.registry.importing import OverShared, open_source
from experts.routing import RoutingPrompt
from experts.routing.loading import load_model, load_tokenizer


def prepare_expert(
    bundle: Bundle,
    name: str,
    source: Path,
    spec: CompressionSpec | None = None,
    prompts: Sequence[RoutingPrompt] = (),
    progress: Callable[[str], None] | None = None,
) -> CompressedExpert:
    """Validate a fine-tune, take its exclusive vector against this bundle's shared expert, compress it.

    What was exported from this bundle, and not changed since, is taken over as it is, unless another size is asked.

    Args:
        bundle: the family it joins.
        name: the expert's name to be.
        source: folder of a PEFT LoRA, a GGUF LoRA, a full fine-tune or a ready expert; see `open_source`.
        spec: how to compress; the bundle's own spec if not given.
        prompts: what it is for; read only where the compression depends on activations.
        progress: called with each parameter's name once it is decomposed.

    Raises:
        CheckpointError: the source cannot be read; names the file.
        MismatchError: it does not fit the bundle; names the tensor.
        CompressionError: NaN or Inf in it, a budget that cannot be met, or prompts needed and not given.
        BundleError: the name is not allowed.
    """
    check_name(name)
    # The base itself is not in the bundle. The shared expert has its shapes, config and tokenizer.
    fine_tune = open_source(name, source, bundle)
    chosen = spec or bundle.manifest.compression
    if (
        isinstance(fine_tune, OverShared)
        and fine_tune.kept
        and _same_size(chosen, bundle.manifest.compression)
    ):
        return fine_tune.kept
    statistics = None
    if chosen.allocation == "activation":
        model, tokenizer = load_model(bundle.shared_path), load_tokenizer(bundle.shared_path)
        statistics = expert_statistics(model, tokenizer, name, prompts)
    return compress_exclusive(fine_tune, bundle.shared, bundle.base_delta, chosen, progress, statistics)


def _same_size(one: CompressionSpec, other: CompressionSpec) -> bool:
    """Whether they keep as much, in the same form; by what is chosen makes no difference to what is not chosen."""
    return one == other.model_copy(update={"allocation": one.allocation})


def compress_exclusive(
    fine_tune: FineTune,
    shared: Checkpoint,
    base_delta: BaseDelta,
    spec: CompressionSpec,
    progress: Callable[[str], None] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> CompressedExpert:
    """The compressed exclusive vector of a fine-tune that was opened against the shared expert."""
    deltas = exclusive_vector(fine_tune, shared.streamed(), base_delta)
    return compress(deltas, spec, model_nbytes=shared.nbytes, progress=progress, statistics=statistics)


def exclusive_vector(
    fine_tune: FineTune, shared: Checkpoint, base_delta: BaseDelta
) -> Iterator[tuple[str, Delta]]:
    """v_t = θ_t − θ*, one parameter after another; parameters without a difference are left out.

    Where the fine-tune stores θ_t itself, θ* is subtracted as stored, so nothing depends on θ₀. Where it
    stores a product, v_t = δ_t − (θ* − θ₀) and stays low-rank if the merge did. Where it is a change of θ*, that
    change is it.
    """
    for name in shared.names:
        if isinstance(fine_tune, OverShared):
            known = fine_tune.exclusive(name)
            if known is not None:
                yield name, known
            continue
        own = fine_tune.tensor(name)
        if own is None:
            delta = exclusive_delta(fine_tune.delta(name), base_delta.delta(name))
        else:
            delta = own.to(torch.float32) - shared.tensor(name).to(torch.float32)
            if not delta.any():
                continue
        if delta is not None:
            yield name, delta


def describe_source(source: Path) -> ExpertSource:
    """What kind of checkpoint a folder holds, and a sha256 over its weights and config.

    Raises:
        CheckpointError: it has no weights that can be read.
    """
    files: tuple[Path, ...]
    kind: Literal["lora", "full", "gguf", "expert"]
    if (source / "adapter_config.json").is_file():
        kind, files = "lora", (source / "adapter_config.json", *find_weights(source, "adapter_model"))
    elif (source / EXPERT_FILES[0]).is_file():
        kind, files = "expert", tuple(source / file for file in EXPERT_FILES)
    elif not (source / "config.json").is_file() and (adapter := find_gguf(source)) is not None:
        kind, files = "gguf", (adapter,)
    else:
        kind, files = "full", (source / "config.json", *find_weights(source, "model"))
    digests = hashlib.sha256("".join(digest(file).sha256 for file in files).encode())
    return ExpertSource(kind=kind, sha256=digests.hexdigest())
