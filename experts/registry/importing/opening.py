"""Open a folder as whatever kind of source it is, over the base or over the bundle's shared expert."""

from pathlib import Path

from experts.bundle import Bundle
from experts.bundle_manifest import EXPERT_FILES, SHARED_NAME
from experts.checkpoint import FineTune, open_fine_tune
from experts.checkpoint.compatibility import require_same_tokenizer
from experts.checkpoint.gguf_file import find_gguf
from experts.checkpoint.gguf_lora import GgufLora
from experts.checkpoint.lora import LoraFineTune
from experts.checkpoint.mark import SharedMark, read_mark, shared_digest
from experts.errors import CheckpointError, MismatchError
from experts.registry.importing.kept import kept_adapter
from experts.registry.importing.over_shared import OverShared
from experts.registry.importing.ready import ready_expert


def mark_of(bundle: Bundle) -> SharedMark:
    """The mark of this bundle's shared expert."""
    prefix = f"{SHARED_NAME}/"
    files = {
        path.removeprefix(prefix): entry.sha256
        for path, entry in bundle.manifest.files.items()
        if path.startswith(prefix)
    }
    return SharedMark(bundle.manifest.name, shared_digest(files))


def open_source(name: str, path: Path, bundle: Bundle) -> FineTune:
    """Open `path` for a registration with this bundle.

    A ready expert, or an adapter that is marked as one of a shared expert, becomes an `OverShared`. Everything else
    is a fine-tune of the base, opened against the shared expert, which has its shapes.

    Args:
        name: the expert's name to be.
        path: a folder with a PEFT LoRA, a whole model, one GGUF LoRA, or expert.safetensors and expert.json.
        bundle: the family that it joins.

    Raises:
        CheckpointError: the folder cannot be read or used; names the file and the mend.
        MismatchError: it is over another shared expert, or does not fit; names the tensor, field or file.
    """
    found = read_mark(path) if path.is_dir() else None
    if found is None:
        if (path / EXPERT_FILES[0]).is_file():
            raise CheckpointError(
                f"{path / EXPERT_FILES[0]} does not tell of which shared expert it is; export the expert from its "
                "server, which marks it"
            )
        return open_fine_tune(name, path, bundle.shared)
    told, exactly = found
    own = mark_of(bundle)
    if told.digest != own.digest:
        raise MismatchError(
            f"{_marked(path)} is over the shared expert {told.digest[:12]} of bundle {told.bundle!r}, this one is "
            f"{own.digest[:12]} of {own.bundle!r}; register the fine-tune that it was made of"
        )
    if (path / "adapter_config.json").is_file():
        adapter: LoraFineTune | GgufLora = LoraFineTune(name, path, bundle.shared)
        require_same_tokenizer(path, bundle.shared.path)
    elif (path / EXPERT_FILES[0]).is_file():
        ready = ready_expert(path, bundle.shared)
        return OverShared(name, path, bundle, ready.exclusive, (path / EXPERT_FILES[0],), ready.compressed)
    else:
        adapter = GgufLora(name, path, bundle.shared)
    kept = kept_adapter(adapter, exactly, bundle.shared) if exactly else None
    return OverShared(name, path, bundle, adapter.delta, adapter.files, kept)


def _marked(folder: Path) -> Path:
    """The file of a marked source that people know it by."""
    for name in ("adapter_config.json", EXPERT_FILES[0]):
        if (folder / name).is_file():
            return folder / name
    return find_gguf(folder) or folder
