"""PEFT's mixed batch: `generate(adapter_names=[…])`, one adapter a row, batches as large as there are clients."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peers.family import ADAPTERS, Family
from benchmarks.peers.peer import PeerRequest, PeerRun, batch_lengths, in_batches, only_adapter


class PeftBatch:
    """All eight adapters resident in bfloat16, in this process."""

    name = "PEFT mixed batch"

    def __init__(self, family: Family) -> None:
        self._family = family
        self._model: Any = None

    def __enter__(self) -> Self:
        base = AutoModelForCausalLM.from_pretrained(self._family.base, dtype=torch.bfloat16)
        first, *others = ADAPTERS
        # Left to itself PEFT keeps 16-bit adapters in float32, which is slower here.
        model = PeftModel.from_pretrained(
            base, self._family.adapter(first), adapter_name=first, autocast_adapter_dtype=False
        )
        for name in others:
            model.load_adapter(self._family.adapter(name), adapter_name=name, autocast_adapter_dtype=False)
        self._model = model.train(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None

    def run(self, requests: Sequence[PeerRequest], clients: int) -> PeerRun:
        """Batches of `clients` requests, one after another; a row is whole when its batch is."""
        return in_batches(self._generate, requests, clients)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[PeerRequest]) -> list[list[int]]:
        length, tokens = batch_lengths(batch)
        ids = torch.tensor([request.prompt_ids for request in batch])
        generated = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[only_adapter(request) for request in batch],
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answers: list[list[int]] = generated[:, length:].tolist()
        return answers
