"""vLLM's CPU build with multi-LoRA: one adapter a request, different ones in one batch, no mixes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.family import ADAPTERS, RANK, Family
from benchmarks.peers.http_server import HttpPeer, check_prompt
from benchmarks.peers.install import vllm_program
from benchmarks.peers.peer import PeerRequest, PeerResultError, PeerUnavailableError, only_adapter


class VllmCpu(HttpPeer):
    """`vllm serve` with all adapters loaded, prefix caching off since benchmarks repeat their prompts.

    Args:
        work: the folder of all that the peers need.
        sequences: the most that run at once.
        cores: for the computing threads: "auto" keeps one core free for the server's other processes, "nobind"
            takes all, "0,1" names them.
    """

    name = "vLLM CPU"

    def __init__(self, family: Family, work: Path, sequences: int = 32, cores: str = "auto") -> None:
        super().__init__(work / "logs" / "vllm-server.log")
        self._family = family
        self._work = work
        self._sequences = sequences
        self._cores = cores

    def command(self, port: int) -> list[str]:
        """The server's command line."""
        program = vllm_program(self._work)
        if not program.is_file():
            raise PeerUnavailableError(
                f"{self.name}: not installed; run: python -m benchmarks.peers.install vllm"
            )
        return [
            *(str(program), "serve", str(self._family.base), "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "512"),
            *("--max-num-seqs", str(self._sequences), "--no-enable-prefix-caching"),
            *("--enable-lora", "--max-loras", str(len(ADAPTERS)), "--max-lora-rank", str(RANK)),
            *("--lora-modules", *(f"{name}={self._family.adapter(name)}" for name in ADAPTERS)),
        ]

    def environment(self) -> Mapping[str, str]:
        """A gigabyte for the KV cache, and the cores."""
        return {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": self._cores,
            "VLLM_NO_USAGE_STATS": "1",
        }

    def body(self, request: PeerRequest) -> dict[str, Any]:
        """The adapter is the model."""
        return {
            "model": only_adapter(request),
            "prompt": list(request.prompt_ids),
            "max_tokens": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def check(self, answer: dict[str, Any], request: PeerRequest) -> int:
        """The server says how much it read and wrote, and with which adapter."""
        check_prompt(answer["usage"]["prompt_tokens"], request)
        if answer["model"] != only_adapter(request):
            raise PeerResultError(f"asked for {only_adapter(request)}, answered by {answer['model']}")
        count: int = answer["usage"]["completion_tokens"]
        return count

    def output(self, answer: dict[str, Any]) -> Sequence[int]:
        """The generated ids."""
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens
