"""Fast greedy generation on a plain `transformers` model: the same answers as `generate`, for evaluation.

What makes it fast: the tokens that all prompts begin with run once and their keys and values are repeated; keys and
values lie in buffers that are allocated once a batch; rows that ended, or whose score can no longer change, leave the
batch. Knows no metric and no merge.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Settled = Callable[[str], bool]
"""Whether a text, as far as it is generated, can only end in a score that is known already."""

_KEEP = 0.75
"""Rows are taken out of a batch when no more than that part of them is still going."""


@dataclass(frozen=True)
class Ask:
    """One prompt: the whole text, at most so many new tokens, and when to stop early."""

    text: str
    limit: int
    settled: Settled | None = None


class RowGates(Protocol):
    """Something in the model that acts on each row of a batch by that row's gates."""

    def prepare(self, gates: Tensor) -> None:
        """The passes to come use no other gates than these, (rows, experts)."""

    def rows(self, gates: Tensor | None) -> AbstractContextManager[None]:
        """While it is entered the rows of the batch have these gates, (rows, experts)."""


class _Buffer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in one allocation of a known length."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        """`keys`, `values`: (rows, heads, length, size); the first `used` places are filled."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self._used = keys, values, used
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new places, give all that are filled."""
        assert self.keys is not None
        assert self.values is not None
        end = self._used + key_states.shape[-2]
        self.keys[..., self._used : end, :] = key_states
        self.values[..., self._used : end, :] = value_states
        self._used = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the mask covers, and the first of them."""
        return self._used + query_length, 0

    def get_seq_length(self) -> int:
        """Filled places."""
        return self._used

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    def fill(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the same first places, (1, heads, used, size), into these rows."""
        assert self.keys is not None
        assert self.values is not None
        self._used = keys.shape[-2]
        self.keys[rows, :, : self._used] = keys
        self.values[rows, :, : self._used] = values

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass
class _Batch:
    """Rows that generate together; `places` are their indices among all prompts."""

    places: list[int]
    cache: Cache
    buffers: list[_Buffer]
    mask: Tensor
    positions: Tensor
    tokens: Tensor
    gates: Tensor | None

    def keep(self, rows: Tensor) -> None:
        """Only these rows stay."""
        self.places = [self.places[row] for row in rows.tolist()]
        for buffer in self.buffers:
            buffer.keep(rows)
        self.mask, self.positions, self.tokens = self.mask[rows], self.positions[rows], self.tokens[rows]
        self.gates = None if self.gates is None else self.gates[rows]


class Greedy:
    """Greedy generation with whatever weights the model has when it is asked.

    Args:
        model: an HF causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        prefix: token ids that prompts may begin with; those that do share them.
        batch: rows at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prefix: Sequence[int] = (),
        batch: int = 96,
    ) -> None:
        self._model, self._tokenizer, self._batch = model, tokenizer, batch
        self._prefix = list(prefix)
        self._gated: RowGates | None = None
        ends = getattr(model.generation_config, "eos_token_id", None)
        listed = [tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
        self._ends = {int(end) for end in listed} | {int(tokenizer.eos_token_id)}
        self._known: dict[str, list[int]] = {}

    @torch.inference_mode()
    def answers(
        self, asks: Sequence[Ask], gates: Tensor | None = None, gated: RowGates | None = None
    ) -> list[str]:
        """One answer a prompt, in their order, without special tokens.

        Args:
            asks: the prompts.
            gates: (prompts, experts) float32, each prompt's.
            gated: what acts on rows by these gates.
        """
        self._gated = gated
        encoded = [self._encode(ask.text) for ask in asks]
        answers = [""] * len(asks)
        prefixes = _Prefixes(self, gates)
        for shared in (True, False):
            rows = [i for i, ids in enumerate(encoded) if self._shares(ids) is shared]
            leading = [0] * len(asks) if gates is None else gates.argmax(1).tolist()
            rows.sort(key=lambda i: (leading[i], asks[i].limit, len(encoded[i])))
            start = len(self._prefix) if shared else 0
            for first in range(0, len(rows), self._batch):
                places = rows[first : first + self._batch]
                suffixes = [encoded[i][start:] for i in places]
                batch = self._start(places, suffixes, prefixes if shared else None, gates, asks)
                for place, text in self._finish(batch, asks).items():
                    answers[place] = text
        return answers

    def texts(self, texts: Sequence[str], limit: int) -> list[str]:
        """The same as a `Generate`."""
        return self.answers([Ask(text, limit) for text in texts])

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        return self._known[text]

    def _shares(self, ids: list[int]) -> bool:
        length = len(self._prefix)
        return 0 < length < len(ids) and ids[:length] == self._prefix

    def forward(self, gates: Tensor | None, **inputs: Any) -> Any:
        """One pass; the rows have these gates."""
        with nullcontext() if self._gated is None else self._gated.rows(gates):
            return self._model(use_cache=True, **inputs)

    def prefix_cache(self, gates: Tensor | None) -> Any:
        """The prefix's keys and values with one row's gates, (1, experts)."""
        from transformers import DynamicCache

        cache = DynamicCache()
        self.forward(gates, input_ids=torch.tensor([self._prefix]), past_key_values=cache, logits_to_keep=1)
        return cache

    def _start(
        self,
        places: list[int],
        suffixes: list[list[int]],
        prefixes: "_Prefixes | None",
        gates: Tensor | None,
        asks: Sequence[Ask],
    ) -> _Batch:
        """Prompts left-padded behind the prefix, and their first new token."""
        before = len(self._prefix) if prefixes else 0
        width = max(len(ids) for ids in suffixes)
        ids = torch.full((len(places), width), int(self._tokenizer.eos_token_id), dtype=torch.long)
        mask = torch.ones(len(places), before + width, dtype=torch.long)
        for row, suffix in enumerate(suffixes):
            ids[row, width - len(suffix) :] = torch.tensor(suffix)
            mask[row, before : before + width - len(suffix)] = 0
        positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, before:]
        own = None if gates is None else gates[places]
        if own is not None and self._gated is not None:
            self._gated.prepare(own)
        buffers = self._buffers(len(places), before + width + max(asks[i].limit for i in places))
        if prefixes:
            prefixes.copy(buffers, places)
        cache = Cache(list(buffers))
        logits = self.forward(
            own,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        return _Batch(places, cache, buffers, mask, positions[:, -1:], _likeliest(logits), own)

    def _buffers(self, rows: int, length: int) -> list[_Buffer]:
        config = self._model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, heads, length, size)

        def empty() -> Tensor:
            return torch.empty(shape, dtype=self._model.dtype)

        return [_Buffer(empty(), empty(), 0) for _ in range(config.num_hidden_layers)]

    def _finish(self, batch: _Batch, asks: Sequence[Ask]) -> dict[int, str]:
        """Decode until every row ended."""
        made: dict[int, list[int]] = {place: [] for place in batch.places}
        going = set(batch.places)
        while True:
            for place, token in zip(batch.places, batch.tokens[:, 0].tolist(), strict=True):
                if place not in going:
                    continue
                if token not in self._ends:
                    made[place].append(token)
                if token in self._ends or len(made[place]) == asks[place].limit:
                    going.remove(place)
            going -= self._settled(sorted(going), made, asks)
            if not going:
                return dict(zip(made, self._decode(list(made.values())), strict=True))
            if len(going) <= _KEEP * len(batch.places):
                rows = [row for row, place in enumerate(batch.places) if place in going]
                batch.keep(torch.tensor(rows))
            batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.places), 1)], dim=1)
            batch.positions = batch.positions + 1
            logits = self.forward(
                batch.gates,
                input_ids=batch.tokens,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                past_key_values=batch.cache,
            ).logits
            batch.tokens = _likeliest(logits)

    def _settled(self, places: list[int], made: dict[int, list[int]], asks: Sequence[Ask]) -> set[int]:
        """Those whose score is known already."""
        asked = [place for place in places if asks[place].settled is not None]
        texts = self._decode([made[place] for place in asked])
        found = set()
        for place, text in zip(asked, texts, strict=True):
            judge = asks[place].settled
            if judge is not None and judge(text):
                found.add(place)
        return found

    def _decode(self, ids: list[list[int]]) -> list[str]:
        if not ids:
            return []
        return [str(text) for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _likeliest(logits: Tensor) -> Tensor:
    """(rows, tokens, vocabulary) → (rows, 1), of the last token; the first of equals.

    `max` takes a third of the time that `argmax` does in bfloat16.
    """
    return logits[:, -1].max(-1, keepdim=True).indices


class _Prefixes:
    """The prefix's keys and values, once for every different row of gates."""

    def __init__(self, greedy: Greedy, gates: Tensor | None) -> None:
        self._greedy, self._gates = greedy, gates
        self._caches: dict[tuple[float, ...], Any] = {}

    def copy(self, buffers: list[_Buffer], places: list[int]) -> None:
        """Write each row's into the first places of its buffers."""
        rows: dict[tuple[float, ...], list[int]] = {}
        for row, place in enumerate(places):
            pattern = () if self._gates is None else tuple(self._gates[place].tolist())
            rows.setdefault(pattern, []).append(row)
        for pattern, members in rows.items():
            if pattern not in self._caches:
                gates = torch.tensor([pattern]) if pattern else None
                self._caches[pattern] = self._greedy.prefix_cache(gates)
            for buffer, source in zip(buffers, self._caches[pattern].layers, strict=True):
                buffer.fill(torch.tensor(members), source.keys, source.values)
