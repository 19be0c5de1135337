"""What mixing costs on this machine, measured once at start-up with throwaway experts."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Executor

import torch

from service.core import ExpertKey, Pattern
from service.engine.layout import Decode, PackLayout
from service.engine.merged import StepCosts, materialised
from service.engine.model import Batch, SharedModel
from service.gating.resident import MatrixFactors, ResidentExpert
from service.native.decoder import NativeDecoder, tiled

_RANK = 8
_TOKENS = (1, 8, 32, 128)
_REPEATS = 5
_BLOCK = 1
"""A block that nobody has yet; wiped afterwards."""


@torch.inference_mode()
def measure_costs(model: SharedModel, executor: Executor) -> StepCosts:
    """Extra seconds of a factored step over a plain one, and seconds to materialise one pattern's weights.

    Takes about a second on a model of 135 million parameters. The experts are small random ones of rank 8, two in
    every token, and gone when this returns.
    """
    native = model.native
    assert native is not None, "materialised weights need compiled layers"
    modules = native.parts.modules
    experts = [
        ResidentExpert(
            ExpertKey(f"\0cost-{number}", 0),
            {
                name: MatrixFactors(
                    torch.full((_RANK, module.in_features), 1e-3, dtype=model.bank.dtype),
                    tiled(torch.full((_RANK, module.out_features), 1e-3, dtype=model.bank.dtype)),
                )
                for name, module in modules.items()
            },
            {},
        )
        for number in range(2)
    ]
    for expert in experts:
        model.bank.add(expert)
    try:
        mix = Pattern(tuple((expert.key, 0.5) for expert in experts))
        extra = tuple((count, max(0.0, _extra(model, count, mix))) for count in _TOKENS)
        making = executor.submit(_making, native, experts).result()
    finally:
        model.cache.wipe([(group, _BLOCK) for group in range(len(model.cache.groups))])
        for expert in experts:
            model.bank.remove(expert.key)
    return StepCosts(extra, making, ranks=_RANK * len(experts))


@torch.inference_mode()
def _making(native: NativeDecoder, experts: Sequence[ResidentExpert]) -> float:
    """Seconds for all layers, from one layer; where it is done later, though without steps beside it."""
    started = time.perf_counter()
    for path, module in native.parts.layers[0].matrices.values():
        factors = [(expert.matrices[f"{path}.weight"], 0.5) for expert in experts]
        native.arranged(materialised(module.weight, factors))
    return (time.perf_counter() - started) * len(native.parts.layers)


def _extra(model: SharedModel, count: int, mix: Pattern) -> float:
    plain = [_seconds(model, count, Pattern())]
    mixed = [_seconds(model, count, mix)]
    for _ in range(_REPEATS - 1):
        plain.append(_seconds(model, count, Pattern()))
        mixed.append(_seconds(model, count, mix))
    return _middle(mixed) - _middle(plain)


def _seconds(model: SharedModel, count: int, pattern: Pattern) -> float:
    # Sequences of one token, all in the same block: what differs is the mixing, whatever attention does.
    batch = Batch(
        tokens=[0] * count,
        positions=[0] * count,
        layout=PackLayout(decode=(Decode(0, [[_BLOCK] for _ in model.cache.groups]),) * count),
        counts=[1] * count,
        keeps=[0] * count,
        patterns=[pattern] * count,
        lower=[pattern] * count,
    )
    started = time.perf_counter()
    model.forward(batch)
    return time.perf_counter() - started


def _middle(values: Sequence[float]) -> float:
    return statistics.median(values)
