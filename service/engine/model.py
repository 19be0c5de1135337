"""The shared expert as the engine runs it: an unmodified HF model, checked, with slot attention and gating."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from experts.routing import FeatureSpec, decoder_layers, pool
from service.engine import attention
from service.engine.attention import KvCache
from service.engine.layout import Chunk, PackLayout, Segment
from service.errors import ExpertRejectedError
from service.gating.bank import ExpertBank


class UnsupportedModelError(ExpertRejectedError):
    """The shared model needs something that packed steps cannot give exactly."""

    code = "unsupported_model"


@dataclass(frozen=True, slots=True)
class Forward:
    """What one packed pass gives.

    Attributes:
        logits: (kept tokens, vocabulary) in the model's dtype.
        features: (segments, feature width) float32, one for every prompt that was routed.
    """

    logits: Tensor
    features: Tensor | None


class SharedModel:
    """Runs packed steps.

    Args:
        path: an ordinary HF folder.
        rows: KV rows.
        max_tokens: most tokens of one sequence.
        spec: which hidden state the router reads; None without a router.
    """

    def __init__(
        self,
        path: Path,
        *,
        rows: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        spec: FeatureSpec | None,
        pack_base: bool = True,
    ) -> None:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        check_config(config)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.IMPLEMENTATION,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        self.model.train(False).requires_grad_(False).to(device)
        self.device = device
        self.spec = spec
        self.cache = KvCache(rows, max_tokens)
        attention.attach(self.model, self.cache)
        self.bank = ExpertBank(self.model, pack_base=pack_base)
        self._hidden: Tensor | None = None
        self._capture()
        self._probe()

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: valid token ids are below it."""
        embedding = self.model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        return embedding.shape[0]

    @torch.inference_mode()
    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], layout: PackLayout, kept: Sequence[int]
    ) -> Forward:
        """One packed pass. `bank.begin_step` must have set the gates.

        Args:
            tokens, positions: (tokens,) each, in packing order.
            kept: indices of the tokens whose logits are wanted.
        """
        self.cache.begin(layout, self.device)
        self._hidden = None
        output = self.model(
            input_ids=torch.tensor(tokens, device=self.device)[None],
            position_ids=torch.tensor(positions, device=self.device)[None],
            use_cache=False,
            logits_to_keep=torch.tensor(kept, dtype=torch.long, device=self.device),
        )
        features = self._features(layout.segments) if layout.segments else None
        return Forward(output.logits[0], features)

    def _features(self, segments: Sequence[Segment]) -> Tensor | None:
        if self.spec is None:
            return None
        assert self._hidden is not None
        hidden = self._hidden[0]
        return torch.stack([pool(hidden[s.begin : s.end], self.spec.pooling) for s in segments])

    def _capture(self) -> None:
        """Keep the hidden state that the router reads, from inside the same pass."""
        if self.spec is None:
            return

        def keep(_module: object, _args: object, output: object) -> None:
            hidden = getattr(output, "last_hidden_state", output)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            assert isinstance(hidden, Tensor)
            self._hidden = hidden

        if self.spec.layer == -1:
            self.model.base_model.register_forward_hook(keep)
        else:
            decoder_layers(self.model)[self.spec.layer - 1].register_forward_hook(keep)

    @torch.inference_mode()
    def _probe(self) -> None:
        """One small pass that checks that attention is ours in every layer and lets norms find their axes."""
        count = _probe_length(self.model.config)
        tokens = [index % self.vocabulary for index in range(count)]
        chunk = PackLayout(chunks=(Chunk(0, count, row=0, start=0),))
        problems = self.bank.probe(count, lambda: self.forward(tokens, range(count), chunk, [count - 1]))
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(self.cache.layers) != layers or problems:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: {len(self.cache.layers)} of {layers} layers attend through the cache"
                + (f"; {problems[0]}" if problems else "")
                + "; serve a model whose layers all use transformers' attention interface"
            )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse, by name, what a packed step could not compute exactly.

    Raises:
        UnsupportedModelError: linear attention, softcapped attention, attention sinks, RoPE whose scale
            depends on the longest position in the batch, encoder-decoder, or bidirectional attention.
    """
    text = config.get_text_config()
    kind = text.model_type
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    strange = layers - {"full_attention", "sliding_attention"}
    if strange:
        raise UnsupportedModelError(
            f"{kind}: layers of type {sorted(strange)} keep state outside the KV cache"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedModelError(
            f"{kind}: attn_logit_softcapping is not supported by the packed attention"
        )
    if kind == "gpt_oss" or getattr(text, "attention_sinks", None):
        raise UnsupportedModelError(f"{kind}: attention sinks are not supported by the packed attention")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind}: encoder-decoder models are not supported")
    if getattr(text, "use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{kind}: bidirectional attention is not supported")
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in {"dynamic", "longrope"}:
            raise UnsupportedModelError(
                f"{kind}: rope_type {parameters['rope_type']!r} depends on the longest position in the batch; "
                "set a static rope_type in config.json"
            )


def _probe_length(config: PreTrainedConfig) -> int:
    """A token count that differs from every head count, so that axes cannot be confused."""
    text = config.get_text_config()
    heads = {getattr(text, name, 0) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    return next(count for count in (5, 7, 11, 13) if count not in heads)
