"""Which files of this machine make up a fine-tune."""

import hashlib
import re
from pathlib import Path

_ADAPTER = re.compile(r"adapter_config\.json|adapter_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_MODEL = re.compile(r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_READY = re.compile(r"expert\.(json|safetensors)")
_GGUF = re.compile(r"[^/]+\.gguf")
_SIGNATURE = "twinserve.sig"

_KINDS = (
    ("adapter_config.json", _ADAPTER),
    ("expert.json", _READY),
    ("config.json", _MODEL),
)


class SourceError(ValueError):
    """What is there cannot be a fine-tune; told as a usage error."""


def files_of(source: Path) -> dict[str, Path]:
    """Name → path of the files to send, and of no others: tokenizers, optimisers and logs stay here.

    Args:
        source: a folder, or one file of it: a .gguf alone, any other with what it needs beside it.

    Raises:
        SourceError: there is nothing that a server could make an expert of.
    """
    if source.is_file():
        if source.suffix == ".gguf":
            return {source.name: source}
        source = source.parent
    if not source.is_dir():
        raise SourceError(
            f"{source} is neither a file nor a folder here; --server-path is for folders of the server"
        )
    entries = {path.name: path for path in sorted(source.iterdir()) if path.is_file()}
    for config, pattern in _KINDS:
        if config in entries:
            chosen = {name: path for name, path in entries.items() if pattern.fullmatch(name)}
            if not any(name.endswith(".safetensors") for name in chosen):
                raise SourceError(f"{source} has {config} and no .safetensors file of it")
            break
    else:
        chosen = {name: path for name, path in entries.items() if _GGUF.fullmatch(name)}
        if len(chosen) != 1:
            raise SourceError(
                f"{source} holds no fine-tune: adapter_config.json, config.json or expert.json with .safetensors "
                "beside it, or one .gguf file"
            )
    if _SIGNATURE in entries:
        chosen[_SIGNATURE] = entries[_SIGNATURE]
    return chosen


def fingerprint(files: dict[str, Path]) -> str:
    """Tells these files, as they are now, from all others; reads none of them."""
    told = [
        f"{name}\0{path.resolve()}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}"
        for name, path in files.items()
    ]
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()
