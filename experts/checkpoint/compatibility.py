"""Whether a fine-tune computes as its base does and reads the same tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.checkpoint.model import Checkpoint
from experts.checkpoint.storage import read_json
from experts.errors import CheckpointError, MismatchError

_FUNCTION = (
    "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "activation_function",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling", "rope_parameters",
    "rope_local_base_freq", "rotary_pct", "partial_rotary_factor", "sliding_window", "use_sliding_window",
    "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "use_parallel_residual", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "logits_scaling",
)  # fmt: skip
"""Config fields that change what the same weights compute."""

_BYTEWISE = ("vocab.json", "merges.txt", "tokenizer.model", "spiece.model")


def require_same_function(fine_tune: Checkpoint, base: Checkpoint) -> None:
    """Raise unless the two configs make the same function of the same weights.

    A field that only one config has is taken to be that one's default spelt out.

    Raises:
        MismatchError: names the field and both values.
    """
    if fine_tune.architecture != base.architecture:
        raise MismatchError(
            f"{fine_tune.path} is a {fine_tune.architecture}, the base {base.path} is a {base.architecture}; "
            "merging needs fine-tunes of one base"
        )
    for key in _FUNCTION:
        if key in fine_tune.config and key in base.config and fine_tune.config[key] != base.config[key]:
            raise MismatchError(
                f"{fine_tune.path / 'config.json'} has {key} = {fine_tune.config[key]!r}, the base has "
                f"{base.config[key]!r}; a fine-tune may change weights only"
            )


def require_same_tokenizer(folder: Path, base: Path) -> None:
    """Raise if `folder` brings a tokenizer that gives other ids than the base's.

    A folder without tokenizer files is read with the base's tokenizer, and fits.

    Raises:
        MismatchError: names the file and a token.
        CheckpointError: a tokenizer file is corrupt.
    """
    ours, theirs = folder / "tokenizer.json", base / "tokenizer.json"
    if ours.is_file() and theirs.is_file():
        _require_same_fast_tokenizer(ours, theirs)
        return
    for name in _BYTEWISE:
        ours, theirs = folder / name, base / name
        if ours.is_file() and theirs.is_file() and _content(ours) != _content(theirs):
            raise MismatchError(f"{ours} differs from the base's; fine-tune with the base's own tokenizer")


def _content(path: Path) -> Any:
    return read_json(path) if path.suffix == ".json" else path.read_bytes()


def _require_same_fast_tokenizer(ours: Path, theirs: Path) -> None:
    if ours.read_bytes() == theirs.read_bytes():
        return
    our_json, their_json = read_json(ours), read_json(theirs)
    our_ids, their_ids = _token_ids(ours, our_json), _token_ids(theirs, their_json)
    for token in sorted(our_ids.keys() | their_ids.keys()):
        if our_ids.get(token) != their_ids.get(token):
            raise MismatchError(
                f"{ours} gives token {token!r} the id {our_ids.get(token)}, the base's tokenizer "
                f"{their_ids.get(token)}; fine-tune with the base's own tokenizer, without adding tokens"
            )
    for part in ("normalizer", "pre_tokenizer"):
        if our_json.get(part) != their_json.get(part):
            raise MismatchError(
                f"{ours} has another {part} than the base's; fine-tune with the base's tokenizer"
            )
    if _merges(our_json) != _merges(their_json):
        raise MismatchError(f"{ours} has other merges than the base's; fine-tune with the base's tokenizer")


def _token_ids(path: Path, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token → id, the added ones included."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, dict):
            ids = dict(vocabulary)
        else:  # a Unigram model: [token, score] in id order
            ids = {token: index for index, (token, _) in enumerate(vocabulary)}
        ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tokenizer.json ({error!r}); fetch the file again") from error
    return ids


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """Merges in one form: older files write "a b", newer ones ["a", "b"]."""
    merges = tokenizer["model"].get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]
