"""How the parameters of decoder-only models are called; a leaf."""

HEADS = frozenset({"lm_head.weight", "embed_out.weight"})
"""Output projections that a model with tied embeddings may store a second time."""

RENAMED = {("gpt_neox", "embed_out.weight"): "lm_head.weight"}
"""(model type, name in files) → name in transformers 5, which renames while it loads and saves."""

TOKEN_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"})
"""Module names, without the path before them, of token embeddings."""

POSITION_EMBEDDINGS = frozenset({"wpe", "embed_positions", "position_embeddings"})
"""The same of learnt position embeddings."""


def module_name(parameter: str) -> str:
    """The last module's own name: "wte" of "transformer.wte.weight"."""
    return parameter.rsplit(".", 2)[-2] if "." in parameter else ""
