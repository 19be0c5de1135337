"""The shared expert as the engine runs it: an unmodified HF model, checked, with paged attention and gating.

On a CPU its decoder layers run compiled where their structure is recognised; everything else, and every
other model, runs as transformers wrote it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from experts.routing import FeatureSpec, decoder_layers
from service.core import Pattern
from service.engine import attention
from service.engine.attention import PagedAttention
from service.engine.cache import KvCache
from service.engine.layout import PackLayout, Segment
from service.engine.reading import Reading, Settle
from service.errors import ExpertRejectedError
from service.gating.bank import ExpertBank, GatePlan
from service.native import prepack
from service.native.build import NativeUnavailableError
from service.native.decoder import SHARED_BASE, NativeDecoder
from service.native.memory import page_out
from service.native.parts import UnrecognisedError, find_parts

_log = logging.getLogger(__name__)

NativeChoice = Literal["auto", "on", "off"]

_PROBED = 24
"""Tokens of the probing pass, at least."""

_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Largest relative difference of logits at which compiled layers count as the model's own."""


class UnsupportedModelError(ExpertRejectedError):
    """The shared model needs something that packed steps cannot give exactly."""

    code = "unsupported_model"


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How the shared model is held.

    Attributes:
        kv_bytes: what the KV cache may take; at least one longest sequence always fits.
        max_tokens: most tokens of one sequence.
        chunk_tokens: most prompt tokens of one sequence in a step.
        pack_base: reorder base weights for the processor where that gains.
        native: compiled decoder layers: where they work, insist on them, or never.
        native_cache: folder of compiled libraries; None is the user's own.
        int8: keep the matrices of the compiled layers as int8 with one scale a row; insists on compiled layers.
    """

    kv_bytes: int = 2**28
    max_tokens: int = 4096
    chunk_tokens: int = 1024
    pack_base: bool = True
    native: NativeChoice = "auto"
    native_cache: Path | None = None
    int8: bool = False


@dataclass(slots=True)
class Batch:
    """One packed step.

    Attributes:
        tokens, positions: (tokens,) each, in packing order.
        kept: indices of the tokens whose logits are wanted.
        pooled: indices of the tokens whose states behind the final norm are wanted; none of a segment.
        counts: tokens of every run of tokens with the same gates, in packing order, segments included.
        keeps: how many of each run are kept.
        patterns: gates of every run in the layers from the routing depth on.
        lower: gates below the routing depth; differs from `patterns` where routing is single-pass.
        late: runs whose gates are found at the routing depth: index → the token range that the router reads.
        decide: given such an index and the features (d,) float32, the gates; asked once a step for each.
        settle: asked at the router's first tap, which segments it needs to read no further.
        base: weight set of the decoder layers.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    layout: PackLayout = field(default_factory=PackLayout)
    kept: list[int] = field(default_factory=list)
    pooled: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    keeps: list[int] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)
    lower: list[Pattern] = field(default_factory=list)
    late: Mapping[int, Segment] = field(default_factory=dict)
    decide: Callable[[int, Tensor], Pattern] | None = None
    settle: Settle | None = None
    base: int = SHARED_BASE


@dataclass(frozen=True, slots=True)
class Forward:
    """What one packed pass gives.

    Attributes:
        logits: (kept tokens, vocabulary) in the model's dtype.
        features: (segments, feature width) float32, one for every prompt that was routed, NaN in the layers that
            were not read for a settled one; None without a router.
        states: (pooled tokens, hidden) in the model's dtype; None if there are none.
    """

    logits: Tensor
    features: Tensor | None
    gates: GatePlan
    states: Tensor | None = None


class _Reached(Exception):  # noqa: N818 - ends a pass early, nothing is wrong
    """Only routed prompts are in the step, and the router has what it needs."""


class SharedModel:
    """Runs packed steps.

    Args:
        path: an ordinary HF folder.
        spec: which hidden state the router reads; None without a router.

    Raises:
        UnsupportedModelError: the model cannot be served exactly, or compiled layers were insisted on in vain.
    """

    def __init__(
        self,
        path: Path,
        options: ModelOptions,
        *,
        dtype: torch.dtype,
        device: torch.device,
        spec: FeatureSpec | None,
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
        self.options = options
        self.cache = KvCache()
        self._attention = PagedAttention(self.cache)
        attention.attach(self.model, self._attention)
        self._depth = self._routing_depth()
        plain = self._first_pass()
        self.cache.allocate(options.kv_bytes, options.max_tokens, options.chunk_tokens, dtype, device)
        self.native = self._compiled(plain)
        self.bank = ExpertBank(self.model, native=self.native, pack_base=options.pack_base)
        self._batch: Batch | None = None
        self._reading: Reading | None = None
        self._states: Tensor | None = None
        self._hook()
        self._probe()
        if self.bank.packed or self.native is not None:
            page_out(self.model.parameters())

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: valid token ids are below it."""
        embedding = self.model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        return embedding.shape[0]

    @property
    def width(self) -> int:
        """Values of a final state."""
        return int(self.model.config.get_text_config().hidden_size)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Forward:
        """One packed pass."""
        placement = self.cache.place(batch.layout, batch.positions)
        if self.native is not None:
            self.native.begin(placement)
            return self._native_pass(self.native, batch)
        self._attention.begin(batch.layout, placement, self.device)
        return self._own_pass(batch)

    # -- compiled layers ----------------------------------------------------------------------------

    def _native_pass(self, native: NativeDecoder, batch: Batch) -> Forward:
        parts, layers, cached = native.parts, len(native.parts.layers), batch.layout.cached_tokens
        plan = self.bank.set_gates(batch.lower, batch.counts, batch.keeps)
        hidden: Tensor = parts.embedding(torch.tensor(batch.tokens)[None])[0].contiguous()
        reading, done = self._read(batch), 0

        def run(last: int) -> None:
            nonlocal hidden, done
            if hidden.shape[0]:
                hidden = native.run(hidden, done, last, batch.base)
            done = last

        if reading is not None:
            for tap in reading.taps:
                run(tap)
                reading.take(hidden)
                hidden = self._settled(native, batch, reading, hidden)
        if self._depth is not None and (reading is not None or batch.lower != batch.patterns):
            run(self._depth)
            if reading is not None:
                reading.take(hidden)
                self._decide_late(batch, reading)
            plan = self._upper(batch, plan)
            hidden = hidden[:cached]
        run(layers)
        if self._depth is None and reading is not None and reading.segments:
            with self.bank.after_layers(kept=False):
                reading.take(parts.norm(hidden[cached:][None])[0], begin=cached)
        features = None if reading is None else reading.features()
        states = None
        if batch.pooled:
            with self.bank.at(batch.pooled):
                states = parts.norm(hidden[batch.pooled][None])[0]
        if not batch.kept:
            return Forward(hidden.new_empty(0, self.vocabulary), features, plan, states)
        chosen = hidden[batch.kept] if len(batch.kept) < hidden.shape[0] else hidden
        with self.bank.after_layers(kept=True):
            return Forward(parts.head(parts.norm(chosen[None]))[0], features, plan, states)

    def _settled(self, native: NativeDecoder, batch: Batch, reading: Reading, hidden: Tensor) -> Tensor:
        """The states without those of segments whose gates are certain after the first tap."""
        cached = batch.layout.cached_tokens
        if batch.settle is None or not reading.first:
            return hidden
        settled = reading.settled(batch.settle)
        if not any(settled):
            return hidden
        rows = reading.leave(settled)
        if not rows:
            return hidden[:cached]
        left = replace(batch.layout, segments=reading.segments)
        rows = [*range(cached), *rows]
        native.begin(self.cache.place(left, [batch.positions[row] for row in rows]))
        return hidden[rows]

    def _compiled(self, plain: Tensor) -> NativeDecoder | None:
        """The compiled layers if they are wanted, can be had, and give the model's own logits."""
        choice = self.options.native
        if choice == "off":
            return None
        try:
            if self.device.type != "cpu" or self.model.dtype not in _CLOSE:
                raise UnrecognisedError(
                    f"compiled layers are for float32 and bfloat16 on a CPU, not "
                    f"{self.model.dtype} on {self.device}"
                )
            parts = find_parts(self.model, self._positions())
            shapes = [
                replace(shape, group=self.cache.layers[layer].group)
                for layer, shape in sorted(self.cache.seen.items())
            ]
            pack = self.options.pack_base and self.model.dtype is torch.bfloat16 and prepack.available()
            native = NativeDecoder(parts, shapes, pack=pack, cache=self.options.native_cache)
            ordered = [self.cache.layers[layer] for layer in sorted(self.cache.layers)]
            native.set_cache([layer.keys for layer in ordered], [layer.values for layer in ordered])
            self._compare(native, plain)
            if self.options.int8:
                # Only now: rounded weights may answer the probing tokens, which mean nothing, quite differently.
                native.quantise()
        except (UnrecognisedError, NativeUnavailableError) as error:
            if choice == "on" or self.options.int8:
                asked = "TWINSERVE_SHARED_WEIGHTS=int8" if self.options.int8 else "TWINSERVE_NATIVE=on"
                raise UnsupportedModelError(f"{asked}, but: {error}") from error
            _log.info("decoder layers run uncompiled: %s", error)
            return None
        return native

    @torch.inference_mode()
    def _compare(self, native: NativeDecoder, plain: Tensor) -> None:
        tokens = self._probe_tokens()
        segment = PackLayout(segments=(Segment(0, len(tokens)),))
        native.begin(self.cache.place(segment, range(len(tokens))))
        hidden = native.parts.embedding(torch.tensor(tokens)[None])[0].contiguous()
        hidden = native.run(hidden, 0, len(native.parts.layers))
        got = native.parts.head(native.parts.norm(hidden[None]))[0].to(torch.float32)
        wanted = plain.to(torch.float32)
        difference = float((got - wanted).norm() / wanted.norm())
        if not difference <= _CLOSE[self.model.dtype]:
            raise UnrecognisedError(f"compiled logits differ from the model's own by {difference:.3f}")

    # -- the model's own layers ---------------------------------------------------------------------

    def _own_pass(self, batch: Batch) -> Forward:
        plan = self.bank.set_gates(batch.lower, batch.counts, batch.keeps)
        self._batch, self._reading = batch, self._read(batch)
        try:
            output = self.model(
                input_ids=torch.tensor(batch.tokens, device=self.device)[None],
                position_ids=torch.tensor(batch.positions, device=self.device)[None],
                use_cache=False,
                logits_to_keep=torch.tensor(batch.kept, dtype=torch.long, device=self.device),
            )
            logits = output.logits[0]
        except _Reached:
            logits = torch.empty(0, self.vocabulary, dtype=self.model.dtype, device=self.device)
        finally:
            reading, self._batch, self._reading = self._reading, None, None
            states, self._states = self._states, None
        return Forward(logits, None if reading is None else reading.features(), plan, states)

    def _hook(self) -> None:
        """Inside the model's own pass: keep what the router reads, and set the gates that hold from there on.

        And keep the final states of tokens that are pooled.
        """

        def ended(_module: object, _args: object, output: object) -> None:
            if self._batch is not None and self._batch.pooled:
                self._states = _states(output)[self._batch.pooled]

        self.model.base_model.register_forward_hook(ended)
        if self.spec is None:
            return

        def tapped(_module: object, _args: object, output: object) -> None:
            batch, reading = self._batch, self._reading
            if batch is None or reading is None:
                return
            reading.take(_states(output))
            # Rows cannot leave the model's own pass: it ends here, or goes on with all of them.
            alone = reading.first and not batch.layout.cached_tokens
            if alone and batch.settle is not None and all(reading.settled(batch.settle)):
                raise _Reached

        def reached(_module: object, _args: object, output: object) -> None:
            batch, reading = self._batch, self._reading
            if batch is None:
                return
            if reading is not None:
                reading.take(_states(output))
            if self._depth is None:
                return
            if not batch.layout.cached_tokens:
                raise _Reached
            if batch.late or batch.lower != batch.patterns:
                if reading is not None:
                    self._decide_late(batch, reading)
                self.bank.set_gates(batch.patterns, batch.counts, batch.keeps)

        for tap in self.spec.taps:
            decoder_layers(self.model)[tap - 1].register_forward_hook(tapped)
        if self._depth is None:
            self.model.base_model.register_forward_hook(reached)
        else:
            decoder_layers(self.model)[self._depth - 1].register_forward_hook(reached)

    # -- both ---------------------------------------------------------------------------------------

    def _upper(self, batch: Batch, plan: GatePlan) -> GatePlan:
        """Set the gates of the layers from the routing depth on; tokens of segments are gone by then."""
        cached = len(batch.counts) - len(batch.layout.segments)
        upper = self.bank.set_gates(batch.patterns[:cached], batch.counts[:cached], batch.keeps[:cached])
        return GatePlan(max(plan.active, upper.active), plan.repacked or upper.repacked)

    def _decide_late(self, batch: Batch, reading: Reading) -> None:
        for index in batch.late:
            assert batch.decide is not None
            batch.patterns[index] = batch.decide(index, reading.late(index))

    def _read(self, batch: Batch) -> Reading | None:
        """What the router is to read in this pass; None if nothing."""
        if self.spec is None or not (batch.layout.segments or batch.late):
            return None
        return Reading(self.spec, batch.layout.segments, batch.late)

    def _positions(self) -> int:
        """Positions that a step can hold: of sequences, of what the router reads, of the probing pass."""
        read = self.spec.max_tokens if self.spec is not None else 0
        return max(self.options.max_tokens, read, len(self._probe_tokens()))

    def _routing_depth(self) -> int | None:
        """The decoder layer whose output the router reads; None where it reads the end of the model."""
        if self.spec is None:
            return None
        read = [layer for layer in (*self.spec.taps, self.spec.layer) if layer != -1]
        layers = len(decoder_layers(self.model)) if read else 0
        if read and read[-1] > layers:
            raise UnsupportedModelError(
                f"the router reads layer {read[-1]}, the model has {layers}; rebuild the router"
            )
        return None if self.spec.layer == -1 else self.spec.layer

    def _probe_tokens(self) -> list[int]:
        """Tokens from all over the vocabulary, in a number that no head count has, so that axes cannot be confused.

        The first ids of a vocabulary are mostly special: one after another they drive some models to where
        bfloat16 says nothing.
        """
        text = self.model.config.get_text_config()
        sizes = {
            getattr(text, name, 0) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        }
        count = next(count for count in range(_PROBED, _PROBED + 4) if count not in sizes)
        return [(index + 1) * self.vocabulary // (count + 1) for index in range(count)]

    @torch.inference_mode()
    def _first_pass(self) -> Tensor:
        """The plain model's logits for the probing tokens; attention learns every layer's shape in it."""
        tokens = self._probe_tokens()
        layout = PackLayout(segments=(Segment(0, len(tokens)),))
        self._attention.begin(layout, self.cache.place(layout, range(len(tokens))), self.device)
        found: Tensor = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=torch.arange(len(tokens), device=self.device)[None],
            use_cache=False,
        ).logits[0]
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(self.cache.seen) != layers:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: {len(self.cache.seen)} of {layers} layers attend through the cache; "
                "serve a model whose layers all use transformers' attention interface"
            )
        return found

    def _probe(self) -> None:
        """The same pass with gating in place, in which norms find their axes."""
        problems = self.bank.probe(len(self._probe_tokens()), self._first_pass)
        if problems:
            raise UnsupportedModelError(f"{type(self.model).__name__}: {problems[0]}")


def _states(output: object) -> Tensor:
    """(tokens, hidden) of what a decoder layer or the whole decoder gives for one pack."""
    hidden = getattr(output, "last_hidden_state", output)
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert isinstance(hidden, Tensor)
    return hidden[0]


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
