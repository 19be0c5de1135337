"""Our own server behind the same interface, so that it is paired with the others like one of them."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.family import Family
from benchmarks.peers.http_server import HttpPeer, check_prompt
from benchmarks.peers.peer import PeerRequest, PeerResultError

_GATE_TOLERANCE = 0.01


class Twinserve(HttpPeer):
    """`twinserve serve` on the family's bundle, from this checkout and this environment.

    Args:
        work: the folder of all that the peers need.
        options: more options of `twinserve serve`.
    """

    name = "twinserve"
    health = "/health/ready"

    def __init__(self, family: Family, work: Path, options: Sequence[str] = ()) -> None:
        super().__init__(work / "logs" / "twinserve-server.log")
        self._family = family
        self._options = options

    def command(self, port: int) -> list[str]:
        """The server's command line."""
        serve = [sys.executable, "-m", "service", "serve", "--bundle", str(self._family.bundle)]
        return [*serve, "--port", str(port), *self._options]

    def body(self, request: PeerRequest) -> dict[str, Any]:
        """Gates by name; none is the shared expert."""
        return {
            "model": "peers",
            "prompt": list(request.prompt_ids),
            "max_tokens": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "gates": dict(request.gates),
        }

    def check(self, answer: dict[str, Any], request: PeerRequest) -> int:
        """The server says how much it read and wrote, and which gates it used."""
        check_prompt(answer["usage"]["prompt_tokens"], request)
        used = answer["routing"]["gates"]
        for name in {*used, *request.gates}:
            if not math.isclose(used.get(name, 0), request.gates.get(name, 0), abs_tol=_GATE_TOLERANCE):
                raise PeerResultError(f"asked for {dict(request.gates)}, the server used {used}")
        count: int = answer["usage"]["completion_tokens"]
        return count

    def output(self, answer: dict[str, Any]) -> Sequence[int]:
        """It returns text, not ids."""
        return ()
