"""A fine-tune → a compressed expert of one bundle. Writes nothing, so it can run in any process."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experts.bundle import Bundle
from experts.bundle_delta import BaseDelta
from experts.bundle_files import digest
from experts.bundle_manifest import ExpertSource, check_name
from experts.checkpoint import Checkpoint, FineTune, open_fine_tune
from experts.checkpoint.storage import find_weights
from experts.compression import CompressedExpert, CompressionSpec, compress, exclusive_delta
from experts.factors import Delta
from experts.registry.calibration import expert_statistics
from experts.routing import RoutingPrompt
from experts.routing.loading import load_model, load_tokenizer


def prepare_expert(
    bundle: Bundle,
    name: str,
    source: Path,
    spec: CompressionSpec | None = None,
    prompts: Sequence[RoutingPrompt] = (),
) -> CompressedExpert:
    """Validate a fine-tune, take its exclusive vector against this bundle's shared expert, compress it.

    `Bundle.publish_expert` makes the result live.

    Args:
        bundle: the family it joins.
        name: the expert's name to be.
        source: a PEFT LoRA folder or a full fine-tune of the same base.
        spec: how to compress; the bundle's own spec if not given.
        prompts: what it is for; read only where the compression depends on activations.

    Raises:
        CheckpointError: the source cannot be read; names the file.
        MismatchError: it does not fit the bundle; names the tensor.
        CompressionError: NaN or Inf in it, a budget that cannot be met, or prompts needed and not given.
        BundleError: the name is not allowed.
    """
    check_name(name)
    # The base itself is not in the bundle. The shared expert has its shapes, config and tokenizer.
    fine_tune = open_fine_tune(name, source, bundle.shared)
    chosen = spec or bundle.manifest.compression
    statistics = None
    if chosen.allocation == "activation":
        model, tokenizer = load_model(bundle.shared_path), load_tokenizer(bundle.shared_path)
        statistics = expert_statistics(model, tokenizer, name, prompts)
    return compress_exclusive(fine_tune, bundle.shared, bundle.base_delta, chosen, statistics=statistics)


def compress_exclusive(
    fine_tune: FineTune,
    shared: Checkpoint,
    base_delta: BaseDelta,
    spec: CompressionSpec,
    progress: Callable[[str], None] | None = None,
    statistics: Mapping[str, Tensor] | None = None,
) -> CompressedExpert:
    """The compressed exclusive vector of a fine-tune that was opened against the shared expert."""
    deltas = exclusive_vector(fine_tune, shared, base_delta)
    return compress(deltas, spec, model_nbytes=shared.nbytes, progress=progress, statistics=statistics)


def exclusive_vector(
    fine_tune: FineTune, shared: Checkpoint, base_delta: BaseDelta
) -> Iterator[tuple[str, Delta]]:
    """v_t = θ_t − θ*, one parameter after another; parameters without a difference are left out.

    Where the fine-tune stores θ_t itself, θ* is subtracted as stored, so nothing depends on θ₀. Where it
    stores a product, v_t = δ_t − (θ* − θ₀) and stays low-rank if the merge did.
    """
    for name in shared.names:
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
        CheckpointError: it has no safetensors weights.
    """
    is_lora = (source / "adapter_config.json").is_file()
    config = "adapter_config.json" if is_lora else "config.json"
    files = (source / config, *find_weights(source, "adapter_model" if is_lora else "model"))
    digests = hashlib.sha256("".join(digest(file).sha256 for file in files).encode())
    return ExpertSource(kind="lora" if is_lora else "full", sha256=digests.hexdigest())
