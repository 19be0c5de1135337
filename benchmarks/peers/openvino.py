"""OpenVINO GenAI, in a process of its own: one adapter for every row of a batch, which is all that it can batch."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.family import ADAPTERS, Family, once
from benchmarks.peers.install import openvino_python
from benchmarks.peers.peer import PeerRequest, PeerRun, PeerUnavailableError, batch_lengths, in_batches

_WORKER = Path(__file__).with_name("openvino_worker.py")
_STOP_SECONDS = 30


class OpenVino:
    """The exported model with one adapter, fixed when it starts; batches as large as there are clients.

    Args:
        work: the folder of all that the peers need.
        adapter: which one.
    """

    name = "OpenVINO GenAI"

    def __init__(self, family: Family, work: Path, adapter: str = ADAPTERS[0]) -> None:
        self._family = family
        self._work = work
        self._adapter = adapter
        self._log = work / "logs" / "openvino-worker.log"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        python = openvino_python(self._work)
        if not python.exists():
            raise PeerUnavailableError(
                f"{self.name}: not installed; run: python -m benchmarks.peers.install openvino"
            )
        model = self.export()
        weights = self._family.adapter(self._adapter) / "adapter_model.safetensors"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                # -P: this folder has modules named like those that the worker imports.
                [str(python), "-P", str(_WORKER), str(model), str(weights)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self._answer()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def export(self) -> Path:
        """The base in OpenVINO's form with 16-bit weights; OpenVINO computes in bfloat16 where the CPU can."""
        return once(self._family.path / "openvino", self._export)

    def run(self, requests: Sequence[PeerRequest], clients: int) -> PeerRun:
        """Batches of `clients` requests, one after another; a row is whole when its batch is."""
        others = [dict(request.gates) for request in requests if dict(request.gates) != {self._adapter: 1.0}]
        if others:
            raise ValueError(f"this peer has {self._adapter} with weight 1 for every row, not {others[0]}")
        return in_batches(self._ask, requests, clients)

    def _ask(self, batch: Sequence[PeerRequest]) -> list[list[int]]:
        assert self._process is not None
        assert self._process.stdin is not None
        _, tokens = batch_lengths(batch)
        line = json.dumps({"prompts": [request.prompt_ids for request in batch], "new_tokens": tokens})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answers: list[list[int]] = self._answer()
        return answers

    def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait(_STOP_SECONDS)
            said = self._log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
            raise PeerUnavailableError(f"{self.name} ended with {code}: {said}")
        return json.loads(line)

    def _export(self, out: Path) -> None:
        exporter = openvino_python(self._work).with_name("optimum-cli")
        options = ("--task", "text-generation-with-past", "--weight-format", "fp16")
        done = subprocess.run(
            [str(exporter), "export", "openvino", "--model", str(self._family.base), *options, str(out)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        if done.returncode:
            raise PeerUnavailableError(f"{self.name}: the export failed: {done.stderr[-2000:]}")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()
