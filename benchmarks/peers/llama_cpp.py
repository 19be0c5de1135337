"""llama.cpp's server: a scale for every adapter in every request, `"lora": [{"id": …, "scale": …}]`.

Requests with different scales are not batched together there, so mixes queue.
"""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.family import ADAPTERS, Family, once
from benchmarks.peers.http_server import HttpPeer, check_prompt
from benchmarks.peers.install import llama_cpp_converter_path, llama_cpp_server, llama_cpp_source
from benchmarks.peers.peer import PeerRequest, PeerResultError, PeerUnavailableError

_TOKENS_A_SLOT = 256


class LlamaCpp(HttpPeer):
    """`llama-server` with a bfloat16 model, every adapter loaded and none applied by default.

    Args:
        work: the folder of all that the peers need.
        slots: sequences at once; as many as clients, else they queue for a slot too.
    """

    name = "llama.cpp server"
    route = "/completion"

    def __init__(self, family: Family, work: Path, slots: int) -> None:
        super().__init__(work / "logs" / "llama.cpp-server.log")
        self._family = family
        self._work = work
        self._slots = slots

    def command(self, port: int) -> list[str]:
        """Convert what is not converted yet, then the server's command line."""
        server = llama_cpp_server(self._work)
        if not server.is_file():
            raise PeerUnavailableError(
                f"{self.name}: not built; run: python -m benchmarks.peers.install llama.cpp"
            )
        model, adapters = self.convert()
        return [
            str(server),
            *("--model", str(model)),
            *("--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"),
            *("--parallel", str(self._slots), "--ctx-size", str(self._slots * _TOKENS_A_SLOT)),
            *("--threads", str(os.cpu_count()), "--host", "127.0.0.1", "--port", str(port)),
            *("--cache-ram", "0", "--no-webui"),
        ]

    def convert(self) -> tuple[Path, list[Path]]:
        """The family as GGUF files: the model in bfloat16, the adapters as its converter writes them."""
        folder, family = self._family.path / "gguf", self._family
        base = once(folder / "base", lambda out: self._convert("hf", family.base, out, "--outtype", "bf16"))
        adapters = [
            once(
                folder / name,
                lambda out, name=name: self._convert(  # type: ignore[misc]
                    "lora", family.adapter(name), out, "--base", str(family.base), "--outtype", "bf16"
                ),
            )
            for name in ADAPTERS
        ]
        return base / "model.gguf", [adapter / "model.gguf" for adapter in adapters]

    def body(self, request: PeerRequest) -> dict[str, Any]:
        """The server's own completion route: it takes scales, OpenAI's does too but says less."""
        return {
            "prompt": list(request.prompt_ids),
            "n_predict": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": [{"id": ADAPTERS.index(name), "scale": gate} for name, gate in request.gates.items()],
        }

    def check(self, answer: dict[str, Any], request: PeerRequest) -> int:
        """The server says how much it read and wrote, and which scales it used."""
        check_prompt(answer["tokens_evaluated"], request)
        used = {item["id"]: item["scale"] for item in answer["generation_settings"]["lora"]}
        for place, name in enumerate(ADAPTERS):
            if not math.isclose(used.get(place, 0.0), request.gates.get(name, 0.0), abs_tol=1e-6):
                raise PeerResultError(f"asked for {dict(request.gates)}, the server used {used}")
        count: int = answer["tokens_predicted"]
        return count

    def output(self, answer: dict[str, Any]) -> Sequence[int]:
        """The generated ids."""
        tokens: list[int] = answer["tokens"]
        return tokens

    def _convert(self, kind: str, source: Path, out: Path, *options: str) -> None:
        script = llama_cpp_source(self._work) / f"convert_{kind}_to_gguf.py"
        done = subprocess.run(
            [sys.executable, str(script), str(source), "--outfile", str(out / "model.gguf"), *options],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(llama_cpp_converter_path(self._work)),
            },
            check=False,
        )
        if done.returncode:
            raise PeerUnavailableError(f"{self.name}: {script.name} failed: {done.stderr[-2000:]}")
