"""Frozen values that the settings give to a runtime."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Frozen values that the settings give.

    Attributes:
        max_batch: KV rows, the most requests that generate at once.
        max_queue: requests that may wait beyond those.
        max_context: most tokens of prompt and answer; None takes the model's own limit, at most 4096.
        device: torch device, or "auto" for CUDA where there is one.
        dtype: torch dtype name, or "auto" for bfloat16.
        threads: intra-op threads of the engine; None leaves torch's choice.
        prefill_step_tokens, prefill_chunk_tokens: see `Budget`.
        pack_base: reorder base weights for the processor where that gains.
    """

    max_batch: int = 32
    max_queue: int = 256
    max_context: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    prefill_step_tokens: int = 1024
    prefill_chunk_tokens: int = 256
    router_top_k: int | None = None
    router_threshold: float | None = None
    pack_base: bool = True
