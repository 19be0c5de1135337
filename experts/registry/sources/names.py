"""Which files a fine-tune may consist of. Everything else is refused by name, before a byte of it is kept."""

import re

from experts.errors import CheckpointError, SourceError

SIGNATURE_NAME = "twinserve.sig"
"""A detached signature of the other files, base64."""

CONFIGS = ("expert.json", "adapter_config.json", "config.json")
"""One of them says what a folder holds: a ready expert, a LoRA, a whole model."""

MAX_NAME = 128

_PLAIN = frozenset({
    *CONFIGS,
    "expert.safetensors",
    "generation_config.json",
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    SIGNATURE_NAME,
})  # fmt: skip
_SHARD = re.compile(r"(?:adapter_)?model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_GGUF = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,100}[A-Za-z0-9])?\.gguf")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe", ".js")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip


def is_accepted(name: str) -> bool:
    """Whether a source may bring a file of that name."""
    return name in _PLAIN or bool(_SHARD.fullmatch(name)) or bool(_GGUF.fullmatch(name))


def is_weights(name: str) -> bool:
    """Whether an accepted file holds tensors."""
    return name.endswith((".safetensors", ".gguf"))


def check_file_name(name: str) -> str:
    """The name itself, if a source may bring such a file.

    Raises:
        CheckpointError: a pickle, code, an archive, a template or a tokenizer; says what to send instead.
        SourceError: any other name that is not on the list, path-like and oversized ones included.
    """
    if is_accepted(name):
        return name
    shown = ascii(name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…")
    if len(name) > MAX_NAME:
        raise SourceError(f"the file name {shown} has {len(name)} characters, the limit is {MAX_NAME}")
    lowered = name.lower()
    if "/" in name or "\\" in name or name in ("", ".", "..") or not name.isprintable():
        raise SourceError(f"{shown} is not a plain file name; send a name without folders")
    if lowered.endswith(_PICKLES):
        raise CheckpointError(
            f"{shown} is a pickle or the like, which can run code when it is loaded, and is refused; convert it "
            "with save_pretrained(..., safe_serialization=True) and send the .safetensors file"
        )
    if lowered.endswith(_CODE):
        raise CheckpointError(f"{shown} is code, which an expert may not bring; send weights and config only")
    if lowered.endswith(_ARCHIVES):
        raise CheckpointError(
            f"{shown} is an archive, which is never unpacked; send the files that are in it"
        )
    if lowered.endswith(".jinja") or lowered in _TEMPLATES:
        raise CheckpointError(
            f"{shown} is a chat template, which an expert may not bring: all chats use the bundle's; leave it out"
        )
    if lowered in _TOKENIZER:
        raise CheckpointError(
            f"{shown} belongs to a tokenizer, which an expert may not bring: the bundle's is used; leave it out"
        )
    raise SourceError(
        f"{shown} is not a file that an expert is made of; send adapter_config.json and "
        "adapter_model.safetensors, config.json and model.safetensors (or its shards and index), expert.json and "
        "expert.safetensors, or a LoRA as .gguf"
    )
