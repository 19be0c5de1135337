"""Other ways to serve many adapters, each paired with ours on the same family: `benchmarks/peers/family.py`.

Rivals in process meet our engine alone, servers meet our server under the same HTTP client. Requests are the
same for both: prompts of 64 random tokens, 64 new ones, greedy, other prompts in every round.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count

from benchmarks.alone import EngineAlone
from benchmarks.context import Context
from benchmarks.ours import OurServer
from benchmarks.paired import alternate
from benchmarks.peers.family import ADAPTERS, VOCABULARY, Family, ensure_family
from benchmarks.peers.http_server import HttpPeer
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.merge_per_sample import MergePerSample
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import (
    Peer,
    PeerRequest,
    PeerResultError,
    PeerUnavailableError,
    mix_of_three,
    one_adapter_each,
    same_adapter,
)
from benchmarks.peers.peft_batch import PeftBatch
from benchmarks.peers.vllm_cpu import VllmCpu
from benchmarks.report import Figure
from benchmarks.workload import Load
from experts.bundle import Bundle
from service.core import GenerationRequest, RoutingChoice, SamplingParams

Gates = Callable[[int], Mapping[str, float]]
Rate = Callable[[Sequence[PeerRequest], int], float]
"""Requests, clients → tokens a second."""

_MODEL = "82M random Llama, 8 LoRAs of rank 16, bf16"
_PROMPT, _NEW = 64, 64
_serial = count()


def peft(context: Context) -> list[Figure]:
    """PEFT's mixed batch: one adapter a row, which is all that it can."""
    family = ensure_family(context.work)
    ours = _alone(family)
    with PeftBatch(family) as peer:
        return [
            figure
            for batch in context.batches(8, 32)
            for figure in _Duel(context, peer, batch, batch, 2.2, 3.5).fight(ours, one_adapter_each)
        ]


def reference(context: Context) -> list[Figure]:
    """The paper's code: weights merged for each request, then one request at a time."""
    family = ensure_family(context.work)
    ours = _alone(family)
    with MergePerSample(family) as peer:
        return _Duel(context, peer, 8, 8, 8, 15).fight(ours, mix_of_three)


def openvino(context: Context) -> list[Figure]:
    """OpenVINO GenAI with one adapter for all rows: what the hardware can do. Ours: other mixes in each row."""
    family = ensure_family(context.work)
    duel = _Duel(context, OpenVino(family, context.work), 8, 8, 0.6, 1.0)
    figures: list[Figure] = []
    with duel.unless_unavailable(), duel.peer:
        figures = duel.fight(_alone(family), same_adapter, ours_gates=mix_of_three)
    return figures + duel.lost


def llama(context: Context) -> list[Figure]:
    """llama.cpp's server with a mix of three in every request."""
    family = ensure_family(context.work)
    figures: list[Figure] = []
    for clients, number in ((8, 16), (32, 32))[: context.size(2, 1)]:
        duel = _Duel(context, LlamaCpp(family, context.work, clients), clients, number, 3, 6)
        figures += _served(context, family, [duel], mix_of_three)
    return figures


def vllm(context: Context) -> list[Figure]:
    """vLLM's CPU build with one adapter in every request."""
    family = ensure_family(context.work)
    peer = VllmCpu(family, context.work)
    cells = ((8, 16), (32, 32))[: context.size(2, 1)]
    duels = [_Duel(context, peer, clients, number, 2.5, 5) for clients, number in cells]
    return _served(context, family, duels, one_adapter_each)


class _Duel:
    """One rival against ours with a number of clients.

    Attributes:
        lost: what to report once the rival has turned out not to run here.
    """

    def __init__(
        self, context: Context, peer: Peer, clients: int, number: int, at_least: float, aim: float
    ) -> None:
        self.peer = peer
        self.lost: list[Figure] = []
        self._context = context
        self._clients = clients
        self._number = context.size(number, clients)
        self._bounds = (at_least, aim)
        self._name = f"twinserve / {peer.name}, {clients} clients"

    def fight(self, ours: Rate, gates: Gates, *, ours_gates: Gates | None = None) -> list[Figure]:
        """Tokens a second of both, and ours over theirs."""
        context, clients = self._context, self._clients

        def theirs(requests: Sequence[PeerRequest], clients: int) -> float:
            with _awake(self.peer):
                return self.peer.run(requests, clients).tokens_per_second

        for run, own in ((ours, ours_gates or gates), (theirs, gates)):
            run(_requests(clients, own, 0, 8), clients)
        new = context.size(_NEW, 8)
        found = alternate(
            {
                "ours": lambda salt: ours(_requests(self._number, ours_gates or gates, salt, new), clients),
                "theirs": lambda salt: theirs(_requests(self._number, gates, salt, new), clients),
            },
            context.rounds,
        )
        note = f"{_MODEL}; prompt {_PROMPT}, {new} new, {self._number} requests a run; "
        note += f"ours: {_gates_of(ours_gates or gates)}"
        if ours_gates is not None:
            note += f", theirs: {_gates_of(gates)}"
        pairs = zip(found["ours"], found["theirs"], strict=True)
        return [
            context.figure(
                self._name,
                [own / other for own, other in pairs],
                "x throughput",
                "higher",
                at_least=self._bounds[0],
                aim=self._bounds[1],
                note=note,
            ),
            context.figure(
                f"twinserve beside {self.peer.name}, {clients} clients", found["ours"], "tokens/s", "higher"
            ),
            context.figure(f"{self.peer.name}, {clients} clients", found["theirs"], "tokens/s", "higher"),
        ]

    @contextmanager
    def unless_unavailable(self) -> Iterator[None]:
        """Turn a rival that cannot run into a figure that says so."""
        try:
            yield
        except (PeerUnavailableError, PeerResultError) as error:
            at_least, aim = self._bounds
            missing = self._context.missing
            self.lost = [
                missing(self._name, "x throughput", "higher", str(error), at_least=at_least, aim=aim)
            ]


def _served(context: Context, family: Family, duels: Sequence[_Duel], gates: Gates) -> list[Figure]:
    """Both servers are up all the time; whoever isn't being measured is stopped, so that it takes no core."""
    peer, figures = duels[0].peer, list[Figure]()
    with ExitStack() as stack:
        for duel in duels:
            stack.enter_context(duel.unless_unavailable())
        stack.enter_context(peer)
        with OurServer(family.bundle, context.work) as server:

            def ours(requests: Sequence[PeerRequest], clients: int) -> float:
                with _awake(server):
                    return server.run(requests, clients).tokens_per_second

            for each in (peer, server):
                _signal(each, signal.SIGSTOP)
            try:
                for duel in duels:
                    figures += duel.fight(ours, gates)
            finally:
                for each in (peer, server):
                    _signal(each, signal.SIGCONT)
    return figures + [figure for duel in duels for figure in duel.lost]


def _alone(family: Family) -> Rate:
    """Our engine in this process."""
    bundle = Bundle.open(family.bundle)
    engine = EngineAlone.of_bundle(bundle)

    def rate(requests: Sequence[PeerRequest], clients: int) -> float:
        wanted = [
            GenerationRequest(
                f"duel-{next(_serial)}",
                request.prompt_ids,
                SamplingParams(max_tokens=request.new_tokens, temperature=0.0, ignore_eos=True),
                RoutingChoice(gates=request.gates),
            )
            for request in requests
        ]
        return engine.run(wanted, clients).rate

    return rate


def _requests(number: int, gates: Gates, salt: int, new: int) -> list[PeerRequest]:
    load = Load(ADAPTERS, VOCABULARY, prompt_tokens=_PROMPT)
    return [PeerRequest(load.prompt(index, salt), new, gates(index)) for index in range(number)]


def _gates_of(gates: Gates) -> str:
    return gates.__name__.replace("_", " ")


@contextmanager
def _awake(peer: Peer) -> Iterator[None]:
    """Let a stopped server run for a while; what is no server of its own is always awake."""
    _signal(peer, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(peer, signal.SIGSTOP)


def _signal(peer: Peer, number: signal.Signals) -> None:
    if isinstance(peer, HttpPeer) and peer._process is not None:
        os.killpg(peer._process.pid, number)
